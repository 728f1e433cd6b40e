"""What imposing levels does: the state is held, what varies within it responds, nothing else."""

import numpy as np
import pytest
import torch
from tiny_model import response_by_hand, tiny_extractor, tiny_model

COUNTS = np.random.default_rng(0).poisson(2.0, (3, 12))


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture
def extractor():
    return tiny_extractor()


def test_the_cells_change_by_the_response(model, extractor):
    encoded = model.encode(**extractor(COUNTS))
    levels = model.levels(encoded)
    features = extractor.perturbation_features("STAT1=ko+IRF1=x2", levels)
    out = model.respond(encoded, **features)
    for row in range(3):
        changes = dict(zip((0, 1), features["perturbation_values"][row].tolist()))
        wanted = response_by_hand(model, changes)
        for name in ("change", "variance", "direction"):
            assert out[name][row].numpy() == pytest.approx(wanted[name], abs=1e-5)
    assert torch.equal(out.expression, levels + out.change)
    # Nothing of the cell matters but its level of the imposed genes.
    assert torch.equal(model.respond(**features).change, out.change)


def test_taking_away_what_is_not_there_changes_nothing(model, extractor):
    """To the bit: of the gene itself and of all others, whatever the cell."""
    counts = COUNTS.copy()
    counts[:, 0] = 0, 0, 5
    encoded = model.encode(**extractor(counts))
    out = model.respond(encoded, **extractor.perturbation_features("STAT1=ko", model.levels(encoded)))
    assert not out.change[:2].any() and torch.equal(out.expression[:2], model.levels(encoded)[:2])
    assert (out.direction[:2, 1:] == 0.5).all() and (out.variance[:2, 1:] > 0).all()
    assert out.change[2].all()


def test_states_do_not_matter(model, extractor):
    """Neither what states there are, nor which the cell is in, nor how pairs go from one to another."""
    features = extractor.perturbation_features("STAT1=ko", model.levels(model.encode(**extractor(COUNTS))))
    before = model.respond(**features).change
    response = model.model.linear_response
    for buffer in [*response.states.buffers(), *response.single.buffers(), *response.familiarity.buffers()]:
        buffer.normal_()
    assert torch.equal(model.respond(**features).change, before)


def test_rows_and_what_is_asked_are_checked(model, extractor):
    encoded = model.encode(**extractor(COUNTS))
    features = extractor.perturbation_features("STAT1=ko", model.levels(encoded)[:2])
    with pytest.raises(ValueError, match="`perturbation_ids` has 2 rows for 3 encoded states"):
        model.respond(encoded, **features)
    with pytest.raises(ValueError, match="`perturbation_ids` and `perturbation_values` are missing"):
        model.respond(encoded)
    index = torch.tensor([2, 0])
    out = model.respond(encoded, **features, state_index=index)
    assert torch.equal(out.expression, model.levels(encoded)[index] + out.change)

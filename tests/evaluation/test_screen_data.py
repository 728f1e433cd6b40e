"""Pairs of a screen: what is chosen before training is chosen on training controls; what is kept reads all of them."""

import numpy as np
import pytest
from modeling_gppc.evaluation.folder_model import read_run
from modeling_gppc.evaluation.in_context_model import InContextModel
from test_screen_evaluation import make_adata

import train
from data_scripts.cells.screens import ScreenOptions, read_screen
from data_scripts.pairs.pair_folder import PairFolder
from data_scripts.pairs.splits import guard_splits
from modeling_gppc.fitting.factor_model import choose_rank
from modeling_gppc.modeling_gppc import GppcForPerturbationPrediction
from modeling_gppc.training import screen_data
from modeling_gppc.training.screen_data import ScreenTrainingOptions, prepare_screen_pairs

SMALL = [
    *("--model.hidden_size", "8", "--model.intermediate_size", "16"),
    *("--model.readout_size", "8", "--model.num_latents", "2", "--training.max_steps", "2"),
    *("--training.eval_steps", "2", "--training.save_steps", "2", "--training.warmup_steps", "1"),
    *("--training.per_device_train_batch_size", "32", "--training.use_cpu", "true"),
    *("--training.dataloader_num_workers", "0", "--evaluation.n_resamples", "10"),
    *("--evaluation.max_pairs", "100", "--evaluation.floors", "[mean]"),
    *("--data.screen_options.value_kind", "log"),
]


def cells():
    """Cells whose levels follow their library size, of all genes of which the file holds thirty."""
    adata = make_adata(n=20, controls=300)
    generator = np.random.default_rng(3)
    depth = generator.normal(size=adata.n_obs)
    adata.obs["n_counts_full"] = np.round(5_000 * np.exp(0.3 * depth))
    adata.X = adata.X + np.float32(0.2) * depth[:, None].astype(np.float32) + np.float32(1)
    return adata


def prepare(adata, folder, train_on="controls"):
    folder.mkdir()
    adata.write_h5ad(folder / "screen.h5ad")
    options = ScreenTrainingOptions(train_on=train_on, folds=2, max_genes=15, pairs_per_cell=3, value_kind="log")
    return prepare_screen_pairs(str(folder / "screen.h5ad"), options, folder / "pairs", seed=1)


@pytest.mark.parametrize("train_on", ["controls", "perturbations"])
def test_held_out_controls_choose_nothing(tmp_path, train_on):
    """Spoiling the controls that validate and test moves neither genes, slopes, rank nor a training pair."""
    before = prepare(cells(), tmp_path / "before", train_on)
    spoiled = cells()
    controls = np.flatnonzero(spoiled.obs["perturbation"] == "control")
    held_out = np.random.default_rng(1).permutation(controls)[240:]
    generator = np.random.default_rng(9)
    spoiled.X[held_out] = generator.uniform(0, 9, (len(held_out), spoiled.n_vars))
    spoiled.obs.loc[spoiled.obs_names[held_out], "n_counts_full"] = generator.integers(100, 90_000, len(held_out))
    after = prepare(spoiled, tmp_path / "after", train_on)
    assert before.gene_ids == after.gene_ids and len(before.gene_ids) == 15
    assert before.manifest["screen"] == after.manifest["screen"]
    assert before.split("train").equals(after.split("train"))
    assert not before.split("test").equals(after.split("test"))
    # The splits' cells are told apart by their ids, so that a cell in two of them would be refused.
    guard_splits({name: before.split(name) for name in before.splits}, [])


def test_a_division_that_leaks_is_refused(tmp_path, monkeypatch):
    whole = np.split

    def overlapping(controls, cut):
        first, second, third = whole(controls, cut)
        return [first, second, np.concatenate([third, first[:1]])]

    monkeypatch.setattr(screen_data.np, "split", overlapping)
    with pytest.raises(ValueError, match="the gene panel was chosen with test cells"):
        prepare(cells(), tmp_path / "leak")


def test_the_model_that_is_kept_was_refitted_on_all_controls(tmp_path):
    """Rank from the data, the linear response that of all controls: the built-in model's, which fits on them too."""
    file = tmp_path / "screen.h5ad"
    make_adata(n=40, controls=300).write_h5ad(file)
    command = ["--config", "screen_in_context", "--data.screen", str(file), *SMALL]
    assert train.main([*command, "--output_dir", str(tmp_path / "run")]) == 0
    entry = read_run(tmp_path / "run" / "model")["screen"]
    assert (entry["n_control_cells"], entry["n_training_controls"], entry["refit"]) == (300, 240, True)
    screen = read_screen(file, ScreenOptions(value_kind="log"))
    controls = screen.cells_of("control")
    training = np.sort(np.random.default_rng(0).permutation(controls)[:240])
    model = GppcForPerturbationPrediction.from_pretrained(tmp_path / "run" / "model")
    assert model.config.num_factors == entry["n_factors"] == choose_rank(screen.values[training], 0)
    response = model.model.linear_response
    # All but the control that no pair happens to have as its source.
    assert np.allclose(response.gene_mean, screen.values[controls].mean(axis=0), atol=5e-3)
    built_in = InContextModel(screen, n_factors=entry["n_factors"], hold=0.0)
    found = (response.loadings @ response.loadings.T).numpy()
    assert np.allclose(found, built_in.factors.loadings @ built_in.factors.loadings.T, atol=0.02)
    flags = ["--data.screen_options.refit", "false", "--model.num_factors", "2"]
    assert train.main([*command, "--output_dir", str(tmp_path / "plain"), *flags]) == 0
    plain = GppcForPerturbationPrediction.from_pretrained(tmp_path / "plain" / "model")
    assert plain.config.num_factors == 2
    assert np.allclose(plain.model.linear_response.gene_mean, screen.values[training].mean(axis=0), atol=5e-3)
    assert PairFolder(tmp_path / "plain" / "pairs").manifest["screen"]["refit"] is False

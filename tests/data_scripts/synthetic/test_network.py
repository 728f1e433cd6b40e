"""The network: determinism, moments, regulation, the do-operator, confounded pairs, files and bad configs."""

import dataclasses

import numpy as np
import pytest
from known_network import affects, confounded_pairs
from known_responses import intervene

from data_scripts.synthetic.network import SyntheticConfig, load_network, make_network

SMALL = {"n_genes": 24, "n_regulators": 4, "n_cell_types": 5, "n_donors": 6, "n_datasets": 2, "n_cells": 200}


def small(form: str = "linear", **changes) -> SyntheticConfig:
    return SyntheticConfig(form=form, **{**SMALL, **changes})


def arrays(network) -> dict:
    return {
        field.name: getattr(network, field.name) for field in dataclasses.fields(network) if field.name != "config"
    }


@pytest.mark.parametrize("form", ["linear", "count"])
def test_same_seed_same_network_other_seed_other_network(form):
    first, again, other = (make_network(small(form, seed=seed)) for seed in (3, 3, 4))
    for name, array in arrays(first).items():
        np.testing.assert_array_equal(array, getattr(again, name), err_msg=name)
    assert not np.array_equal(first.weights, other.weights)


@pytest.mark.parametrize("form", ["linear", "count"])
def test_save_and_load_keep_every_array(tmp_path, form):
    network = make_network(small(form))
    network.save(tmp_path / "cells.network.safetensors")
    loaded = load_network(tmp_path / "cells.network.safetensors")
    assert loaded.config == network.config
    for name, array in arrays(network).items():
        np.testing.assert_array_equal(array, getattr(loaded, name), err_msg=name)
    assert [path.name for path in tmp_path.iterdir()] == ["cells.network.safetensors"]


def test_linear_sample_moments_equal_the_analytic_ones():
    network = make_network(small())
    rng = np.random.default_rng(0)
    n = 60_000
    labels = network.sample_labels(rng, n, dataset=0)
    states = network.sample_innovations(rng, labels[0], labels[1], None)
    eta = network.eta(states)
    loadings = network.loadings()
    types = network.type_effects
    between = (types - types.mean(axis=0)).T @ (types - types.mean(axis=0)) / len(types)
    covariance = loadings @ (between + network.donor_cov + network.within_cov) @ loadings.T
    mean = network.base + (network.dataset_effects[0] + types.mean(axis=0)) @ loadings.T
    sd = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(eta.mean(axis=0), mean, atol=5 * sd.max() / np.sqrt(n))
    np.testing.assert_allclose(np.cov(eta, rowvar=False) / np.outer(sd, sd), covariance / np.outer(sd, sd), atol=0.03)


def test_targets_of_the_count_form_saturate_and_switch():
    network = make_network(small("count", switching_share=0.5, coupling=0.0))
    n_reg = SMALL["n_regulators"]
    levels = np.zeros((3, n_reg))
    levels[:, 0] = [-50.0, 50.0, 500.0]
    features = network.features(levels)
    hill, switch = features[:, n_reg], features[:, 2 * n_reg]
    assert hill[0] == pytest.approx(0) and hill[1] == pytest.approx(1) and hill[2] == pytest.approx(hill[1])
    assert switch[0] == pytest.approx(0)
    partner = int(network.switches[0, 0])
    levels[:, partner] = -50.0  # an AND gate: nothing without the partner
    assert np.abs(network.features(levels)[:, 2 * n_reg]).max() < 1e-12
    targets = np.setdiff1d(np.arange(24), network.regulators)
    assert (network.weights[targets, :n_reg] == 0).all()
    assert (network.weights[:, n_reg : 2 * n_reg] != 0).any() and (network.weights[:, 2 * n_reg :] != 0).any()


@pytest.mark.parametrize("form", ["linear", "count"])
def test_do_cuts_incoming_edges_and_recomputes_downstream(form):
    network = make_network(small(form, coupling=1.0, seed=1))
    below, above = next(zip(*np.nonzero(network.coupling)))  # regulator `below` follows regulator `above`
    symbols = network.gene_symbols
    gene = network.regulators[below]
    rng = np.random.default_rng(0)
    states = network.sample_innovations(rng, *network.sample_labels(rng, 50))
    fixed = intervene(network, {symbols[gene]: 2.0})
    assert np.ptp(fixed.eta(states)[:, gene]) < 1e-5  # whatever its regulators say
    # Changing the regulator above moves it in the intact network only.
    pushed = {symbols[network.regulators[above]]: ("factor", 3.0)}
    assert np.abs(intervene(network, pushed).eta(states) - network.eta(states))[:, gene].max() > 0.1
    assert np.abs(intervene(fixed, pushed).eta(states) - fixed.eta(states))[:, gene].max() < 1e-5
    # Only what the regulator reaches moves, and nothing upstream.
    moved = np.abs(fixed.eta(states) - network.eta(states)).max(axis=0) > 1e-5
    reached = affects(network)[below]
    assert moved[gene]
    assert not (moved & ~reached).any()


def test_changing_a_target_changes_nothing_else():
    network = make_network(small())
    rng = np.random.default_rng(0)
    states = network.sample_innovations(rng, *network.sample_labels(rng, 10))
    changed = intervene(network, {"TGT3": "ko"}).eta(states) != network.eta(states)
    assert np.flatnonzero(changed.any(axis=0)).tolist() == network.gene_index(["TGT3"]).tolist()


@pytest.mark.parametrize("form", ["linear", "count"])
def test_confounded_pairs_correlate_without_effect(form):
    network = make_network(small(form, n_genes=60))
    pairs = confounded_pairs(network, 10)
    assert pairs
    rng = np.random.default_rng(0)
    states = network.sample_innovations(rng, *network.sample_labels(rng, 2_000))
    eta = network.eta(states)
    for first, second, correlation in pairs:
        i, j = network.gene_index([first, second])
        assert abs(correlation) >= 0.3
        assert np.corrcoef(eta[:, i], eta[:, j])[0, 1] == pytest.approx(correlation, abs=0.1)
        assert affects(network)[:, [i, j]].all(axis=1).any()  # a common cause
        knocked = intervene(network, {first: "ko"}).eta(states)
        np.testing.assert_array_equal(knocked[:, j], eta[:, j])


def test_names_are_unique_and_found_by_id_and_symbol():
    network = make_network(small())
    assert len(set(network.gene_ids) | set(network.gene_symbols)) == 48
    np.testing.assert_array_equal(network.gene_index(network.gene_ids), network.gene_index(network.gene_symbols))
    np.testing.assert_array_equal(network.gene_index(["REG1", "REG4"]), network.regulators[[0, 3]])
    with pytest.raises(ValueError, match=r"gene `REG9` is not in the network.*did you mean `REG"):
        network.gene_index(["REG9"])


def test_data_sets_measure_different_genes_and_mostly_the_regulators():
    network = make_network(SyntheticConfig(n_genes=400, n_regulators=40, n_datasets=4))
    targets = np.setdiff1d(np.arange(400), network.regulators)
    assert not np.array_equal(network.measured[0], network.measured[1])
    assert network.measured[:, targets].mean() == pytest.approx(0.8, abs=0.05)
    assert network.measured[:, network.regulators].mean() > 0.88


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"form": "counts"}, r"`form` is 'counts'; wanted one of linear, count.*did you mean `count`"),
        ({"n_genes": 2}, r"`n_genes` is 2; wanted a number >= 3"),
        ({"n_regulators": 24}, r"`n_regulators` is 24; wanted fewer than the 24 of `n_genes`"),
        ({"n_donors": 1}, r"`n_donors` is 1; wanted at least the 2 of `n_datasets`"),
        ({"measured_share": 0.0}, r"`measured_share` is 0.0; wanted a number > 0 and <= 1"),
        ({"switching_share": 1.5}, r"`switching_share` is 1.5; wanted a number >= 0 and <= 1"),
        ({"dropout": 1.0}, r"`dropout` is 1.0; wanted a number >= 0 and < 1"),
        ({"noise_scale": 0.0}, r"`noise_scale` is 0.0; wanted a number > 0"),
        ({"dispersion": -1.0}, r"`dispersion` is -1.0; wanted a number >= 0"),
        ({"dispersion": float("nan")}, r"`dispersion` is nan; wanted a number >= 0"),
        ({"library_mean": 0.0}, r"`library_mean` is 0.0; wanted a number > 0"),
    ],
)
def test_bad_configs_are_refused_with_a_hint(changes, message):
    with pytest.raises(ValueError, match=message):
        SyntheticConfig(**{**SMALL, **changes})


def test_loading_something_else_is_an_error(tmp_path):
    from safetensors.numpy import save_file

    with pytest.raises(ValueError, match="does not exist"):
        load_network(tmp_path / "absent.safetensors")
    save_file({"x": np.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="holds no gene network"):
        load_network(tmp_path / "other.safetensors")

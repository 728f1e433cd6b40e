"""Sweeps: what is searched, what an interruption leaves, what is written at the end."""

import json

import optuna
import pytest
import torch
import yaml
from tiny_runs import FLAGS, train_module, write_run_pairs

from data_scripts.command_line import read_flags
from gppc.sweep import SWEEPS, SweepOptions, SweepTrainer, check_values, claim_sweep, read_sweep

STATES = optuna.trial.TrialState
SPACE = {
    "training.learning_rate": {"low": "1e-4", "high": 1e-2, "log": True},
    "training.per_device_train_batch_size": [8, 16],
    "model.decoder_layers": {"low": 1, "high": 2},
    "model.hidden_dropout_prob": {"low": 0.0, "high": 0.4},
    "model.use_linear_response": [True, False],
    "pairings": [["same_type"]],
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_run_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture
def sweep_file(pairs, tmp_path):
    """A sweep of two trials of six steps."""
    run = tmp_path / "run.yaml"
    run.write_text("seed: 0\n")
    options: dict = {"data": {"pairs": str(pairs)}}
    steps = {"training.max_steps": 6, "training.eval_steps": 2, "training.save_steps": 2, "training.logging_steps": 2}
    for name, value in {**FLAGS, **steps}.items():
        section, _, option = name.partition(".")
        if section in ("model", "training"):
            options.setdefault(section, {})[option] = yaml.safe_load(str(value))
    file = tmp_path / "sweep.yaml"
    sweep = {
        "config": str(run),
        "output_dir": str(tmp_path / "out"),
        "n_trials": 2,
        "options": options,
        "space": SPACE,
    }
    file.write_text(yaml.safe_dump(sweep))
    return file


def trials(folder):
    return optuna.load_study(study_name="gppc", storage=f"sqlite:///{folder / 'trials.db'}").get_trials()


def test_a_sweep_is_searched_resumed_and_written(sweep_file, tmp_path, capsys):
    out = tmp_path / "out"
    assert train_module().main(["--sweep", str(sweep_file)]) == 0
    first = trials(out)
    assert [trial.state for trial in first] == [STATES.COMPLETE] * 2
    # The run as it is configured comes first.
    assert first[0].params["training.learning_rate"] == 1e-3
    assert json.loads(first[0].params["training.per_device_train_batch_size"]) == 16
    assert first[0].params["model.decoder_layers"] == 1
    table = (out / "sweep.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 4
    best = min(first, key=lambda trial: trial.value)
    assert table.splitlines()[2].startswith(f"| {best.number} | {best.value:.5f} |")
    options = yaml.safe_load((out / "best.yaml").read_text())
    assert options["model"]["decoder_layers"] == best.params["model.decoder_layers"]
    assert options["training"]["learning_rate"] == best.params["training.learning_rate"]
    assert (out / "figures" / "sweep.png").stat().st_size > 1_000
    # Nothing of a trial is kept but its figures.
    assert not list(out.glob("**/checkpoint-*"))

    assert train_module().main(["--sweep", str(sweep_file)]) == 2
    assert "add `--resume`" in capsys.readouterr().err
    assert train_module().main(["--sweep", str(sweep_file), "--resume", "--n_trials", "3"]) == 0
    after = trials(out)
    assert [trial.params for trial in after[:2]] == [trial.params for trial in first]
    assert len(after) == 3 and after[2].params not in [trial.params for trial in first]
    assert train_module().main(["--sweep", str(sweep_file), "--resume", "--n_trials", "3"]) == 0
    assert len(trials(out)) == 3


def test_an_interrupted_trial_runs_again(sweep_file, tmp_path, monkeypatch):
    calls, evaluate = [], SweepTrainer.evaluate

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # the second evaluation of the second trial
            raise KeyboardInterrupt
        return evaluate(self, *args, **kwargs)

    monkeypatch.setattr(SweepTrainer, "evaluate", interrupted)
    assert train_module().main(["--sweep", str(sweep_file)]) == 130
    assert [trial.state for trial in trials(tmp_path / "out")] == [STATES.COMPLETE, STATES.FAIL]
    lost = trials(tmp_path / "out")[1].params
    # What a kill leaves is a trial that seems to run.
    storage = f"sqlite:///{tmp_path / 'out' / 'trials.db'}"
    killed = optuna.load_study(study_name="gppc", storage=storage).ask({})
    assert trials(tmp_path / "out")[killed.number].state == STATES.RUNNING
    assert train_module().main(["--sweep", str(sweep_file), "--resume"]) == 0
    complete = [trial for trial in trials(tmp_path / "out") if trial.state == STATES.COMPLETE]
    assert len(complete) == 2
    assert complete[1].params == lost


def test_equal_trials_have_equal_errors(sweep_file, tmp_path):
    """Nothing of a trial reaches the next one."""
    sweep = yaml.safe_load(sweep_file.read_text())
    sweep.update(space={"training.learning_rate": [1e-3]}, n_trials=3, prune=False)
    sweep_file.write_text(yaml.safe_dump(sweep))
    assert train_module().main(["--sweep", str(sweep_file)]) == 0
    values = {trial.value for trial in trials(tmp_path / "out")}
    assert len(values) == 1


BAD = {
    "no space": ({}, "`space` is empty"),
    "unknown model option": ({"model.hiden_size": [8]}, "`model.hiden_size` is not an option"),
    "unknown training option": ({"training.learning_rat": [1e-3]}, "`space.training.learning_rat` cannot be searched"),
    "no option of the Trainer": ({"training.n_query_genes": [5]}, "`space.training.n_query_genes` cannot be searched"),
    "no option of a run at all": ({"data.pairs": ["x"]}, "`space.data.pairs` cannot be searched"),
    "a value that does not fit": ({"model.hidden_size": [9]}, "`hidden_size` is 9"),
    "no choices": ({"model.hidden_size": []}, "`space.model.hidden_size` has no choices"),
    "neither choices nor a range": ({"model.hidden_size": 8}, "wanted a list of choices, or {low, high}"),
    "low above high": ({"model.num_latents": {"low": 3, "high": 2}}, "goes from 3 to 2"),
    "unknown key of a range": ({"model.num_latents": {"low": 1, "high": 2, "logg": True}}, "did you mean `log`"),
    "pairings as text": ({"pairings": ["same_type"]}, "`space.pairings` offers 'same_type'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_spaces_are_refused_before_anything_runs(name, sweep_file, tmp_path, capsys):
    space, words = BAD[name]
    sweep = yaml.safe_load(sweep_file.read_text())
    sweep_file.write_text(yaml.safe_dump({**sweep, "space": space}))
    assert train_module().main(["--sweep", str(sweep_file)]) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sizes_that_do_not_fit_each_other_end_a_trial_only(sweep_file, tmp_path):
    sweep = yaml.safe_load(sweep_file.read_text())
    space = {"model.hidden_size": [8, 12], "model.num_attention_heads": [2, 8]}
    sweep_file.write_text(yaml.safe_dump({**sweep, "space": space, "n_trials": 8}))
    assert train_module().main(["--sweep", str(sweep_file)]) == 0
    for trial in trials(tmp_path / "out"):
        fits = not json.loads(trial.params["model.hidden_size"]) % json.loads(
            trial.params["model.num_attention_heads"]
        )
        assert fits == ("refused" not in trial.user_attrs)
        assert fits or trial.state == STATES.PRUNED


def test_another_sweep_is_not_mixed_in(sweep_file, capsys):
    sweep = read_sweep(str(sweep_file), {})
    claim_sweep(sweep, resume=False)
    with pytest.raises(ValueError, match=r"holds another sweep \(`seed` is 0 there and 1 here\)"):
        claim_sweep(read_sweep(str(sweep_file), {"seed": 1}), resume=True)


def test_names_of_sweeps(capsys):
    with pytest.raises(ValueError, match=r"`sweep` defaul does not exist.*did you mean `default`"):
        read_sweep("defaul", {})


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(path):
    flags = ["--options.pairs.query.uri", "cells.soma"] if path.stem == "pbmc" else []
    sweep = read_sweep(path.stem, read_flags(flags, SweepOptions))
    assert isinstance(sweep, SweepOptions)
    assert sweep.folder.name == f"{path.stem}-sweep"
    assert sweep.run_options({}).training.max_steps <= 600
    assert torch.tensor(sweep.n_trials) >= 10


def test_yaml_reads_small_numbers_as_text():
    values = {"low": "1e-4", "high": "1e-2"}
    check_values("training.learning_rate", values)
    assert values == {"low": 1e-4, "high": 1e-2}

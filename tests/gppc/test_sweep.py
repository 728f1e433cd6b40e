"""Sweeps: what is searched, what an interruption leaves, what is written at the end."""

import optuna
import pytest
import yaml
from tiny_runs import FLAGS, train_module, write_run_pairs

from gppc.sweep import ReportToOptuna, distribution, read_sweep
from modeling_gppc.training.arguments import CONFIGS

STATES = optuna.trial.TrialState
SPACE = {
    "training.learning_rate": {"low": "1e-4", "high": 1e-2, "log": True},
    "training.per_device_train_batch_size": [8, 16],
    "model.decoder_layers": {"low": 1, "high": 2},
    "model.use_linear_response": [True, False],
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_run_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


@pytest.fixture
def sweep(pairs, tmp_path):
    """Runs a sweep of short trials; returns the exit status."""
    run, file = tmp_path / "run.yaml", tmp_path / "sweep.yaml"
    run.write_text("seed: 0\n")
    options: dict = {"data": {"pairs": str(pairs)}}
    steps = {"training.max_steps": 6, "training.eval_steps": 2, "training.save_steps": 2, "training.logging_steps": 2}
    for name, value in {**FLAGS, **steps}.items():
        section, _, option = name.partition(".")
        if section in ("model", "training"):
            options.setdefault(section, {})[option] = yaml.safe_load(str(value))

    def start(*flags, space=SPACE, n_trials=2):
        content = {"config": str(run), "output_dir": str(tmp_path / "out"), "n_trials": n_trials}
        file.write_text(yaml.safe_dump({**content, "options": options, "space": space}))
        return train_module().main(["--sweep", str(file), *flags])

    return start


def trials(folder):
    return optuna.load_study(study_name="gppc", storage=f"sqlite:///{folder / 'trials.db'}").get_trials()


def test_a_sweep_is_searched_resumed_and_written(sweep, tmp_path, capsys):
    out = tmp_path / "out"
    assert sweep() == 0
    first = trials(out)
    assert [trial.state for trial in first] == [STATES.COMPLETE] * 2
    assert first[0].params == {} and first[1].params.keys() == SPACE.keys()
    table = (out / "sweep.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n") == 4 and table.count("as configured") == len(SPACE)
    best = min(first, key=lambda trial: trial.value)
    assert table.splitlines()[2].startswith(f"| {best.number} | {best.value:.5f} |")
    # Nothing of a trial is kept but its figures.
    assert not list(out.glob("**/checkpoint-*"))

    assert sweep() == 2
    assert "add `--resume`" in capsys.readouterr().err
    assert sweep("--resume", "--seed", "1") == 2
    assert "holds another sweep (`seed` is 0 there and 1 here)" in capsys.readouterr().err
    assert sweep("--resume", n_trials=3) == 0
    after = trials(out)
    assert [trial.params for trial in after[:2]] == [trial.params for trial in first]
    assert len(after) == 3 and after[2].params not in [trial.params for trial in first]
    # Nothing is left to do.
    assert sweep("--resume", n_trials=3) == 0
    assert len(trials(out)) == 3


def test_best_options_are_those_of_the_best_trial(sweep, tmp_path):
    assert sweep(n_trials=3, space={"training.learning_rate": [0.1, 0.2], "model.decoder_layers": [1, 2]}) == 0
    lines = (tmp_path / "out" / "sweep.md").read_text().splitlines()
    ranked = sorted(trials(tmp_path / "out"), key=lambda trial: trial.value)
    assert [line.split(" | ")[1] for line in lines[2:]] == [f"{trial.value:.5f}" for trial in ranked]
    found, best = yaml.safe_load((tmp_path / "out" / "best.yaml").read_text()), ranked[0]
    assert {f"{part}.{name}": value for part, more in found.items() for name, value in more.items()} == best.params


def test_an_interrupted_trial_does_not_count(sweep, tmp_path, monkeypatch):
    calls, report = [], ReportToOptuna.on_evaluate

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:  # the second evaluation of the second trial
            raise KeyboardInterrupt
        report(self, *args, **kwargs)

    monkeypatch.setattr(ReportToOptuna, "on_evaluate", interrupted)
    assert sweep() == 130
    assert [trial.state for trial in trials(tmp_path / "out")] == [STATES.COMPLETE, STATES.RUNNING]
    assert sweep("--resume") == 0
    assert [trial.state for trial in trials(tmp_path / "out")] == [STATES.COMPLETE, STATES.RUNNING, STATES.COMPLETE]


def test_equal_trials_have_equal_errors(sweep, tmp_path):
    """Nothing of a trial reaches the next one."""
    assert sweep(space={"training.learning_rate": [1e-3]}, n_trials=3) == 0
    assert len({trial.value for trial in trials(tmp_path / "out")}) == 1


def test_sizes_that_do_not_fit_each_other_end_a_trial_only(sweep, tmp_path):
    assert sweep(space={"model.hidden_size": [8, 12], "model.num_attention_heads": [2, 8]}, n_trials=6) == 0
    for trial in trials(tmp_path / "out")[1:]:
        fits = not trial.params["model.hidden_size"] % trial.params["model.num_attention_heads"]
        assert fits == (trial.value is not None)


BAD = {
    "no space": ({}, "`space` is empty"),
    "unknown model option": ({"model.hiden_size": [8]}, "`model.hiden_size` is not an option"),
    "unknown training option": ({"training.learning_rat": [1e-3]}, "did you mean `learning_rate`"),
    "neither of the model nor of training": ({"data.pairs": ["x"]}, "`space.data.pairs` cannot be searched"),
    "a value that does not fit": ({"model.hidden_size": [9]}, "`hidden_size` is 9"),
    "no choices": ({"model.hidden_size": []}, "`space.model.hidden_size` is []"),
    "neither choices nor a range": ({"model.hidden_size": 8}, "wanted a list of choices, or {low, high}"),
    "low above high": ({"model.num_latents": {"low": 3, "high": 2}}, "`space.model.num_latents`"),
    "unknown key of a range": ({"model.num_latents": {"low": 1, "high": 2, "logg": True}}, "argument 'logg'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_spaces_are_refused_before_anything_runs(name, sweep, tmp_path, capsys):
    space, words = BAD[name]
    assert sweep(space=space) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_sweeps():
    with pytest.raises(ValueError, match=r"sweeps/defaul does not exist.*did you mean `default`"):
        read_sweep("defaul", {})


@pytest.mark.parametrize("path", sorted((CONFIGS / "sweeps").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_sweeps_are_valid(path):
    changes = {"options": {"pairs": {"query": {"uri": "cells.soma"}}}} if path.stem == "pbmc" else {}
    sweep = read_sweep(path.stem, changes)
    assert sweep.output_dir == f"runs/{path.stem}-sweep"
    assert sweep.run_options({}).training.max_steps <= 600 and sweep.n_trials >= 10


def test_yaml_reads_small_numbers_as_text():
    found = distribution("training.learning_rate", {"low": "1e-4", "high": "1e-2", "log": True})
    assert (found.low, found.high, found.log) == (1e-4, 1e-2, True)

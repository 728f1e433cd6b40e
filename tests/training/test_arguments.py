"""Options of a run from files and flags; bad input ends with one line and status 2 before anything is made."""

import dataclasses
import json

import anndata
import numpy as np
import pytest
import scipy.sparse as sp
from tiny_runs import ROWS, train_module, write_run_pairs

from data_scripts.command_line import argument_texts, kind_of, read_flags, sections_of
from data_scripts.store.local_census import CensusSource, write_census
from gppc.run_options import ModelOptions, RunOptions, parse_options
from gppc.train_command import LaunchOptions
from modeling_gppc.training import arguments as arguments_module
from modeling_gppc.training.arguments import CONFIGS, TrainingOptions, find_config
from modeling_gppc.training.run_folder import holds_work


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """30 cells of two donors and two types, 12 genes."""
    rng = np.random.default_rng(0)
    counts = rng.poisson(2.0, (30, 12)).astype(np.float32)
    counts[:, 0] += 1
    cells = anndata.AnnData(sp.csr_matrix(counts))
    cells.var_names = [f"ENSG{index:011d}" for index in range(12)]
    cells.obs_names = [f"cell{index}" for index in range(30)]
    cells.obs["cell_type"] = np.where(np.arange(30) < 1, "rare cell", "T cell")
    cells.obs["donor_id"] = [f"donor{index % 2}" for index in range(30)]
    path = tmp_path_factory.mktemp("cells") / "store"
    write_census(path, [CensusSource(cells, "A")])
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_run_pairs(tmp_path_factory.mktemp("pairs") / "pairs")


BLOOD = "cell_type == 'T cell'"
# What is given -> what the line says. STORE, PAIRS and EMPTY stand for paths.
BAD = {
    "folds of a sweep": (["--sweep", "default", "--folds", "all"], ["`--folds` is given with `--sweep`"]),
    "push of a sweep": (["--sweep", "default", "--push_to_hub", "me/x"], ["`--push_to_hub` is given with `--sweep`"]),
    "folds without a screen": (["--pairs.query.uri", "STORE", "--folds", "all"], ["`--folds` all", "`--data.screen"]),
    "a fold that is not there": (
        ["--data.screen", "EMPTY/x.h5ad", "--folds", "5"],
        ["`screen.fold` is 5; wanted 0 to 4 or 'all'"],
    ),
    "several models to one repository": (
        ["--data.screen", "EMPTY/x.h5ad", "--folds", "all", "--push_to_hub", "me/x"],
        ["with `folds` 'all', which makes several models"],
    ),
    "store missing": (["--pairs.query.uri", "EMPTY/none"], ["`uri`", "does not exist", "gppc make-census"]),
    "store that is a folder": (["--pairs.query.uri", "EMPTY"], ["`uri`", "not a store in Census layout"]),
    "filter matches no cell": (
        ["--pairs.query.uri", "STORE", "--pairs.query.obs_filter", "cell_type == 'T cel'"],
        ["obs_filter", "'T cel'", "did you mean `T cell`"],
    ),
    "filter matches no number": (
        ["--pairs.query.uri", "STORE", "--pairs.query.obs_filter", "soma_joinid > 1000"],
        ["obs_filter", "matches none of the store's 30 cells"],
    ),
    "filter malformed": (
        ["--pairs.query.uri", "STORE", "--pairs.query.obs_filter", "cell_type =="],
        ["obs_filter", "malformed"],
    ),
    "filter without a column": (
        ["--pairs.query.uri", "STORE", "--pairs.query.obs_filter", "cell_tipe == 'T cell'"],
        ["cell_tipe", "did you mean `cell_type`"],
    ),
    "one cell in every context": (
        ["--pairs.query.uri", "STORE", "--pairs.query.obs_filter", "cell_type == 'rare cell'"],
        ["fewer than two cells in every context"],
    ),
    "pairs missing": (["--data.pairs", "EMPTY/none"], ["is not a pairs folder", "gppc build-pairs"]),
    "unknown config": (["--config", "pmbc", "--data.pairs", "PAIRS"], ["`config` pmbc", "did you mean `pbmc`"]),
    "unknown key": (
        ["--data.pairs", "PAIRS", "--training.learning_rat", "0.1"],
        ["`--training.learning_rat`", "did you mean `training.learning_rate`"],
    ),
    "unknown section": (
        ["--data.pairs", "PAIRS", "--trainin.max_steps", "3"],
        ["`--trainin.max_steps`", "did you mean `training.max_steps`"],
    ),
    "wrong type": (
        ["--data.pairs", "PAIRS", "--training.max_steps", "many"],
        ["`training.max_steps`", "'many'", "int"],
    ),
    "wrong value": (["--data.pairs", "PAIRS", "--training.max_steps", "0"], ["`training.max_steps` is 0", ">= 1"]),
    "wrong choice": (
        ["--data.pairs", "PAIRS", "--training.precision", "fp64"],
        ["`training.precision` is 'fp64'", "'bf16'"],
    ),
    "fp16 without a GPU": (
        ["--data.pairs", "PAIRS", "--training.precision", "fp16", "--training.use_cpu", "true"],
        ["`training.precision`", "needs a GPU"],
    ),
    "unknown schedule": (
        ["--data.pairs", "PAIRS", "--training.lr_scheduler_type", "cosin"],
        ["lr_scheduler_type", "did you mean `cosine`"],
    ),
    "unknown logger": (
        ["--data.pairs", "PAIRS", "--training.report_to", "[tensorbord]"],
        ["report_to", "did you mean `tensorboard`"],
    ),
    "checkpoints between evaluations": (
        ["--data.pairs", "PAIRS", "--training.eval_steps", "20", "--training.save_steps", "30"],
        ["`training.save_steps` is 30", "multiple of `eval_steps`"],
    ),
    "model key": (["--data.pairs", "PAIRS", "--model.hiden_size", "8"], ["`model.hiden_size`", "`hidden_size`"]),
    "model value": (
        ["--data.pairs", "PAIRS", "--model.hidden_size", "10", "--model.num_attention_heads", "4"],
        ["`hidden_size` is 10", "multiple"],
    ),
    "model key of the data": (["--data.pairs", "PAIRS", "--model.vocab_size", "8"], ["`model.vocab_size`", "data"]),
    "two sources of cells": (
        ["--data.pairs", "PAIRS", "--pairs.query.uri", "STORE"],
        ["`data.pairs` and `pairs.query.uri`", "exactly one"],
    ),
    "no source of cells": ([], ["cells come from none", "`data.files`"]),
    "flag without a value": (
        ["--data.pairs", "PAIRS", "--training.max_steps"],
        ["`--training.max_steps` has no value"],
    ),
    "no flag": (["--data.pairs", "PAIRS", "max_steps=3"], ["`max_steps=3` is not a flag"]),
    "batch larger than the data": (
        ["--data.pairs", "PAIRS", "--training.per_device_train_batch_size", "500"],
        ["500", "203 training pairs"],
    ),
    "missing cells": (["--data.files", "[EMPTY/none.h5ad]"], ["`data.files`", "none.h5ad does not exist"]),
    "missing screen": (["--data.screen", "EMPTY/none.h5ad"], ["`data.screen`", "none.h5ad does not exist"]),
    "missing list of genes": (
        ["--pairs.query.uri", "STORE", "--pairs.panel.rule", "file", "--pairs.panel.file", "EMPTY/none.txt"],
        ["none.txt does not exist"],
    ),
    "settings of another schedule": (
        ["--data.pairs", "PAIRS", "--training.lr_scheduler_kwargs", "{min_lr: 1e-5}"],
        ["`training.lr_scheduler_kwargs`", "do not fit 'cosine'"],
    ),
    "repository with three slashes": (
        ["--data.pairs", "PAIRS", "--push_to_hub", "a/b/c/d"],
        ["`repo_id` is 'a/b/c/d'", "namespace/repo_name"],
    ),
    "repository without a name": (["--data.pairs", "PAIRS", "--push_to_hub", ""], ["`repo_id` is ''"]),
    "push without a network": (["--data.pairs", "PAIRS", "--push_to_hub", "a/b"], ["offline", "HF_HUB_OFFLINE"]),
    "unknown floor": (["--data.pairs", "PAIRS", "--evaluation.floors", "[meen]"], ["`evaluation.floors`", "`mean`"]),
    "split of another pairing": (
        ["--pairs.query.uri", "STORE", "--evaluation.splits", "[same_typ]"],
        ["`evaluation.splits` names 'same_typ'", "did you mean `same_type`"],
    ),
    "output is a file": (
        ["--data.pairs", "PAIRS", "--output_dir", "PAIRS/genes.parquet"],
        ["`output_dir`", "is a file"],
    ),
    "output holds other things": (
        ["--data.pairs", "PAIRS", "--output_dir", "PAIRS"],
        ["holds other files and no run"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_status_2(name, store, pairs, tmp_path, capsys):
    flags, words = BAD[name]
    (tmp_path / "empty").mkdir()
    places = {"STORE": store, "PAIRS": pairs, "EMPTY": tmp_path / "empty"}
    config = tmp_path / "config.yaml"
    config.write_text(f"output_dir: {tmp_path / 'run'}\n")
    given = list(flags)
    for index, flag in enumerate(given):
        for word, place in places.items():
            flag = flag.replace(word, str(place))
        given[index] = flag
    config_flag = [] if "--config" in given else ["--config", str(config)]
    status = train_module().main([*config_flag, *given])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("train.py: error:")]
    assert status == 2 and len(lines) == 1, error
    assert "Traceback" not in error
    for word in words:
        assert word in lines[0]
    # Nothing stands in the way of the corrected command.
    assert not holds_work(tmp_path / "run")


# Known only with the genes and the pairs, and before anything is fitted.
KNOWN_WITH_PAIRS = {
    "split": (["--evaluation.splits", "[same_typ]"], ["`evaluation.splits` names `same_typ`", "`same_type`"]),
    "unknown gene": (["--evaluation.perturbation", "NOPE=ko"], ["`evaluation.perturbation`", "NOPE"]),
    "no action": (["--evaluation.perturbation", "GENE1"], ["`evaluation.perturbation`", "GENE=ACTION"]),
    "unknown action": (["--evaluation.perturbation", "GENE1=kick"], ["`evaluation.perturbation`", "kick"]),
    "share above 1": (["--evaluation.perturbation", "GENE1=kd:2"], ["`evaluation.perturbation`", "between 0 and 1"]),
}


@pytest.mark.parametrize("name", KNOWN_WITH_PAIRS)
def test_what_only_the_pairs_tell_is_told_before_training(name, pairs, tmp_path, capsys, monkeypatch):
    flags, words = KNOWN_WITH_PAIRS[name]
    module = train_module()
    monkeypatch.setattr(module, "train", None)
    assert module.main(["--data.pairs", str(pairs), "--output_dir", str(tmp_path / "run"), *flags]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("train.py: error: ") and all(word in line for word in words), line


@pytest.mark.parametrize("without", ["train", "validation", "test"])
def test_pairs_that_lack_a_split_are_told_before_training(without, tmp_path, capsys):
    rows = {name: count for name, count in ROWS.items() if name != without}
    pairs = write_run_pairs(tmp_path / "pairs", rows)
    assert train_module().main(["--data.pairs", str(pairs), "--output_dir", str(tmp_path / "run")]) == 2
    assert f"`pairs` hold no {without} pair" in capsys.readouterr().err


NUMBERS = {
    "training.learning_rate": ("nan", "inf", "-1e-3", "0", "true", "[1]"),
    "training.weight_decay": ("nan", "-1"),
    "training.adam_beta2": ("1.0", "nan"),
    "training.warmup_steps": ("-1", "1.5"),
    "training.max_steps": ("0", "true", "1.5", "many"),
    "training.dataloader_num_workers": ("-1",),
    "evaluation.max_pairs": ("0", "nan"),
    "evaluation.n_resamples": ("-1", "0"),
    "data.num_proc": ("0",),
    "seed": ("-1", "4294967296", "x"),
    "pairs.seed": ("-1",),
    "pairs.query.target_sum": ("nan", "inf", "0"),
    "pairs.panel.min_measured": ("1.5", "nan"),
    "pairs.panel.n_genes": ("0",),
    "pairs.matching.pairs_per_cell": ("0",),
    "pairs.perturbation.min_genes": ("-1",),
    "model.num_factors": ("0", "-1", "1.5", "true"),
    "model.encoder_layers": ("-1",),
    "model.num_attention_heads": ("0",),
    "model.hidden_dropout_prob": ("nan", "1", "-0.1"),
    "model.variance_loss_weight": ("inf", "-1"),
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in NUMBERS.items() for value in values])
def test_numbers_out_of_range_are_refused_by_name(name, value):
    with pytest.raises(ValueError) as caught:
        parse_options("default", [f"--{name}", value.replace("nan", ".nan").replace("inf", ".inf")])
    message = str(caught.value)
    assert name.rsplit(".", 1)[-1] in message and "\n" not in message, message
    assert "wanted" in message or "expected" in message, message


@pytest.mark.parametrize(
    ("flags", "out"),
    [
        ([], "runs/default"),
        (["--pairs.query.uri", "store/blood.soma"], "runs/blood"),
        (["--data.files", "[a.h5ad, b.h5ad]"], "runs/a"),
        (["--data.synthetic", "{form: count}"], "runs/own"),
        (["--pairs.query.uri", "blood.soma", "--output_dir", "here"], "here"),
        (["--pairs.query.obs_filter", "null"], "runs/default"),
    ],
)
def test_cells_of_a_flag_take_the_place_of_the_examples(flags, out):
    options = parse_options(None, flags)
    assert options.output_dir == out
    own = parse_options("own", ["--pairs.query.uri", "x"]).training
    assert options.training == (parse_options("default", []).training if out == "runs/default" else own)


def test_cells_of_a_flag_take_the_place_of_those_of_the_file():
    options = parse_options("linear", ["--data.pairs", "p"])
    assert options.data.pairs == "p" and options.data.synthetic is None and options.output_dir == "runs/linear"
    assert options.training == parse_options("linear", []).training
    assert parse_options("census_naive_b", ["--pairs.query.uri", "s"]).pairs.query.census_version is None
    with pytest.raises(ValueError, match=r"`data\.pairs` and `data\.example`; wanted exactly one"):
        parse_options("linear", ["--data.pairs", "p", "--data.example", "pbmc68k_reduced"])


def test_a_logger_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(arguments_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ValueError, match=r"`training.report_to` names 'trackio', which is not installed; `pip install tr"
    ):
        TrainingOptions(report_to=["trackio"])


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configs_are_valid(path):
    # The store or the screen is the caller's.
    flags = {name: ["--pairs.query.uri", "cells.soma"] for name in ("own", "pbmc")}
    flags["screen"] = ["--data.screen", "screen.h5ad"]
    options = parse_options(path.stem, flags.get(path.stem, []))
    assert isinstance(options, RunOptions) and options.output_dir.startswith("runs/")
    assert json.loads(json.dumps(options.model)) == options.model


def test_configs_are_found_by_name_and_by_path(tmp_path):
    assert find_config("linear") == find_config("linear.yaml") == CONFIGS / "linear.yaml"
    own = tmp_path / "linear.yaml"
    own.write_text("{}")
    assert find_config(str(own)) == own


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (["--training.max_steps", "5"], {"training": {"max_steps": 5}}),
        (["--training.max-steps=5", "--seed", "1"], {"training": {"max_steps": 5}, "seed": 1}),
        (["--training.learning_rate", "1e-4"], {"training": {"learning_rate": "1e-4"}}),
        (["--evaluation.splits", "[a/b, c]"], {"evaluation": {"splits": ["a/b", "c"]}}),
        (
            ["--training.use_cpu", "true", "--data.pairs", "null"],
            {"training": {"use_cpu": True}, "data": {"pairs": None}},
        ),
        (["--pairs.query.obs_filter", "tissue == 'blood'"], {"pairs": {"query": {"obs_filter": "tissue == 'blood'"}}}),
    ],
)
def test_flags_are_nested_yaml(flags, found):
    assert read_flags(flags, RunOptions) == found


def test_flags_lie_over_the_file_and_the_file_over_defaults(tmp_path):
    config = tmp_path / "own.yaml"
    config.write_text("data: {pairs: p}\ntraining: {max_steps: 7, learning_rate: 1e-4}\n")
    options = parse_options(str(config), ["--training.max_steps", "9"])
    assert (options.training.max_steps, options.training.learning_rate) == (9, 1e-4)
    assert options.training.warmup_steps == TrainingOptions().warmup_steps
    assert options.output_dir == "runs/own"


def test_help_lists_every_option_with_its_meaning(capsys):
    assert train_module().main(["--help"]) == 0
    text = capsys.readouterr().out
    assert "accelerate launch train.py --config linear" in text and "--resume" in text
    sections = list(sections_of(LaunchOptions, RunOptions))
    assert {"data.", "data.synthetic.", "pairs.query.", "pairs.splits.", "screen.", "model.", "training."} <= {
        prefix for prefix, _, _ in sections
    }
    n_options = 0
    for prefix, cls, fields in sections:
        texts = argument_texts(cls)
        assert not prefix or f"\n{prefix[:-1]}:\n" in text
        for field, hint in fields:
            if not dataclasses.is_dataclass(kind_of(hint)):
                n_options += 1
                assert f"\n  --{prefix}{field.name} " in text and texts[field.name], field.name
    assert n_options > 100 and text.count("(default:") == n_options
    assert {entry.name for entry in dataclasses.fields(ModelOptions)} > {"size", "hidden_size", "layer_norm_eps"}


def test_help_of_a_sweep_lists_its_options(capsys):
    assert train_module().main(["--sweep", "default", "--help"]) == 0
    text = capsys.readouterr().out
    assert "--n_trials INTEGER" in text and "\n  --training.max_steps " not in text

"""Every leak is refused with its reason; clean plans pass."""

import pytest

from data_scripts.pairs.leak_guards import SplitPlan, find_leaks, refuse_leaks

CLEAN = {
    "train_cells": ["a", "b"],
    "test_cells": ["c", "d"],
    "train_perturbations": ["STAT1", "IRF1"],
    "test_perturbations": ["JAK2"],
    "reference_perturbations": ["STAT1", "IRF1"],
    "selection_cells": ["v"],
    "panel_cells": ["a", "b"],
    "normalisation_cells": ["a"],
    "scored_genes": ["g1", "g2"],
    "target_genes": ["STAT1", "JAK2"],
}

LEAKS = [
    ("cell on both sides", {"train_cells": ["a", "c"]}, "a cell is in training and in test: 1 shared (c)"),
    ("perturbation on both sides", {"train_perturbations": ["JAK2"]}, "a perturbation is in training and in test"),
    ("the same in other letters", {"train_perturbations": ["jak2"]}, "a perturbation is in training and in test"),
    (
        "the same combination in another order",
        {
            "held_out": "combinations",
            "seen_members": 0,
            "train_perturbations": ["B+A"],
            "test_perturbations": ["A+B"],
        },
        "a perturbation is in training and in test",
    ),
    ("test gene in a combination", {"train_perturbations": ["JAK2+MYC"]}, "is perturbed in a training combination"),
    (
        "member of an unseen combination",
        {"test_perturbations": ["STAT1+MYC"]},
        "a member of a test combination was seen alone",
    ),
    (
        "more members seen than stated",
        {"held_out": "combinations", "test_perturbations": ["STAT1+MYC"], "seen_members": 0},
        "more members seen alone than the stated 0",
    ),
    (
        "members seen without saying so",
        {"held_out": "combinations", "test_perturbations": ["STAT1+MYC"]},
        "without saying how many of their members were seen",
    ),
    (
        "batch on both sides",
        {"held_out": "batches", "train_groups": ["b"], "test_groups": ["b"]},
        "one of the batches is in training and in test",
    ),
    (
        "cell line on both sides",
        {"held_out": "cell_lines", "train_groups": ["K562"], "test_groups": ["K562"]},
        "one of the cell_lines is in training and in test",
    ),
    ("test controls in selection", {"selection_cells": ["c"]}, "controls included, were used for selection"),
    ("panel chosen with test cells", {"panel_cells": ["a", "d"]}, "the gene panel was chosen with test cells"),
    ("normalisation of test cells", {"normalisation_cells": ["c"]}, "normalisation was fitted on test cells"),
    ("test perturbation in the mean", {"reference_perturbations": ["JAK2"]}, "is part of the reference mean"),
    ("target gene scored", {"scored_genes": ["g1", "JAK2"]}, "a target gene of the panel is scored"),
]


def test_a_clean_plan_passes():
    assert find_leaks(SplitPlan(**CLEAN)) == []
    refuse_leaks(SplitPlan(**CLEAN))


@pytest.mark.parametrize(("name", "change", "reason"), LEAKS, ids=[name for name, _, _ in LEAKS])
def test_each_leak_is_refused_with_its_reason(name, change, reason):
    leaks = find_leaks(SplitPlan(**CLEAN | change))
    assert len(leaks) == 1 and reason in leaks[0], leaks
    with pytest.raises(ValueError, match="`split` leaks") as error:
        refuse_leaks(SplitPlan(**CLEAN | change))
    assert reason in str(error.value) and "\n" not in str(error.value)


def test_a_fold_is_guarded_by_rows():
    fold = {"train_cells": [0, 1], "train_perturbations": ["A"], "test_perturbations": ["B"], "target_genes": ["B"]}
    refuse_leaks(SplitPlan(test_cells=[2], scored_genes=["g"], **fold))
    with pytest.raises(ValueError, match="a cell is in training and in test"):
        refuse_leaks(SplitPlan(test_cells=[1], scored_genes=["g"], **fold))

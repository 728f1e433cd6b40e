"""Screens as people have them: each fault ends with one clear line, or is counted and printed."""

import base64
import html.parser
import re

import anndata
import numpy as np
import pytest
from tiny_screens import make_adata

from gppc.cli import main


def evaluate(adata, tmp_path, *arguments):
    path = tmp_path / "screen.h5ad"
    adata.write_h5ad(path)
    base = ["evaluate", "--screen", str(path), "--out", str(tmp_path / "out"), "--quiet", "--model", "covariance"]
    return main([*base, *arguments])


def counts(**changes):
    adata = make_adata(("control", "G0", "G1", "G2"), n=20, controls=60)
    adata.X = np.random.default_rng(0).poisson(np.expm1(adata.X)).astype(np.float32)
    for name, value in changes.items():
        setattr(adata, name, value)
    return adata


def relabelled(adata, old, new):
    labels = adata.obs["perturbation"].astype(str)
    adata.obs["perturbation"] = labels.where(labels != old, new)
    return adata


def half_logged(adata):
    adata.X[:40] = np.log1p(adata.X[:40])
    return adata


def repeated(adata):
    adata.obs_names = ["c0", *adata.obs_names[:-1]]
    return adata


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: relabelled(counts(), "control", "G3"), "no control cells in obs['perturbation']"),
        (lambda: repeated(counts()), "1 duplicate barcodes (e.g. `c0`)"),
        (lambda: half_logged(counts()), "mixes raw and log values: 40 cells hold non-integer values"),
        (lambda: relabelled(relabelled(counts(), "G0", "GHOST"), "G1", "SPOOK"), "has 1 perturbations that can be"),
        (lambda: counts()[::20].copy(), "no perturbation left: fewer than 10 cells of a perturbation"),
    ],
    ids=["no control label", "duplicate barcodes", "mixed log and raw", "targets absent", "one cell a perturbation"],
)
def test_a_screen_that_cannot_be_scored_ends_with_one_line(make, words, tmp_path, capsys):
    assert evaluate(make(), tmp_path) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
    assert not (tmp_path / "out").exists()


def test_what_can_be_left_out_is_counted_and_printed(tmp_path, capsys):
    """One target absent from the genes, one perturbation of a single cell, labels in other letters and separators."""
    adata = counts()
    labels = adata.obs["perturbation"].astype(str).to_numpy()
    labels[labels == "G1"] = np.where(np.arange(20) % 2, "g1", "G1 ")
    labels[labels == "control"] = np.where(np.arange(60) % 2, "Non-Targeting", "non_targeting")
    extra = adata[:22].copy()
    extra.obs_names = [f"extra{index}" for index in range(22)]
    joined = anndata.concat([adata, extra])
    labels = np.concatenate([labels, ["GHOST"] * 20, ["G7"], ["g0;G2"]])
    joined.obs["perturbation"] = labels
    assert evaluate(joined, tmp_path) == 0
    printed = capsys.readouterr().out
    assert "60 controls, 4 perturbations (3 with every target measured)" in printed
    for label in ("G7", "G0+G2"):
        assert f"set aside: 1 cells, fewer than 10 cells of a perturbation ({label})" in printed
    assert "spelt differently were merged, nothing was lost (G1 = g1" in printed
    assert "3 perturbations" in printed
    page = (tmp_path / "out" / "report.html").read_text()
    assert "fewer than 10 cells of a perturbation" in page


class Page(html.parser.HTMLParser):
    """Every tag closed in order, every address an image inside the page."""

    void = {"meta", "img", "br"}
    optional = {"html", "p", "li"}

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        if tag not in self.void | self.optional:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in self.optional:
            assert self.open.pop() == tag


def test_the_page_needs_no_server(tmp_path):
    assert evaluate(counts(), tmp_path) == 0
    text = (tmp_path / "out" / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == [] and not {"script", "link", "iframe"} & set(page.tags) and "url(" not in text
    assert len(page.sources) == 3
    for source in page.sources:
        kind, _, content = source.partition(";base64,")
        assert kind == "data:image/png" and base64.b64decode(content)[:4] == b"\x89PNG"
    assert len(re.findall("<tr", text)) > 6 and str(tmp_path) not in text

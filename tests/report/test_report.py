"""The report of fake runs: one self-contained document, true to the summary, clear where there is nothing to show."""

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from PIL import Image

import kka_ray.report
from kka_ray.data.decode import encode_png
from kka_ray.describe.drift import unique_share
from kka_ray.errors import StoreError
from kka_ray.report import charts, pictures, wording, write_report

VOID = {"meta", "img", "br", "hr", "input", "link", "path", "circle", "rect", "polyline"}
FULL = {
    "No round was run", "No line was written", "No image was drawn", "No drawn image was", "No image was kept",
    "was not trained in this run", "No detector was evaluated", "The guard refused no line",
}  # fmt: skip


class Document(HTMLParser):
    """Reads a page: its tags with attributes, what stands in <data>, its text; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.data: list[float] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "data":
            self.data.append(float(dict(attrs)["value"]))

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if self._open and self._open[-1] != "style":
            self.text += data

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


def render(folder):
    path = write_report(folder)
    assert path == folder / "report.html"
    return Document(path.read_text(encoding="utf-8"))


def test_is_one_document_that_needs_nothing_else(write_fake_run):
    folder, _ = write_fake_run()
    page = render(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert html.startswith("<!doctype html>")
    assert not re.search(r"https?://|url\(|@import|<script|<link", html)
    assert all(source.startswith("data:image/") for source in page.attributes("src"))
    names = set(page.attributes("id"))
    assert all(target.startswith("#") and target[1:] in names for target in page.attributes("href"))


def test_pictures_and_charts_say_what_they_are(write_fake_run):
    page = render(write_fake_run()[0])
    images = [attrs for tag, attrs in page.tags if tag == "img"]
    assert len(images) == 3 * 24 + 100 + 24
    assert all(attrs["alt"] for attrs in images)
    drawn = [attrs for tag, attrs in page.tags if tag == "svg" and "aria-hidden" not in attrs]
    assert len(drawn) == 1 + 6 + 1 + 2 + 2 + 1
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in drawn)


def test_numbers_are_those_of_the_summary(write_fake_run):
    folder, summary = write_fake_run()
    page = render(folder)
    shown = set(page.data)
    spreads = [s for row in summary["detectors"].values() for s in row.values()]
    assert len(spreads) == 5 + 1 + 4
    expected = {s["mean"] for s in spreads} | {s["std"] for s in spreads}
    expected |= {r[k] for r in summary["rounds"] for k in ("described", "rendered", "hard", "easy", "normal_like")}
    expected |= {r["dpo"][k] for r in summary["rounds"] if r["dpo"] for k in ("pairs", "loss_last", "margin")}
    expected |= {summary["audit"][k] for k in ("band_lower", "band_upper", "band_easy")}
    expected |= {summary["wall_seconds"], summary["generated_fraction"], summary["truth"]["spearman"]}
    expected |= {sum(r[k] for r in summary["rounds"]) for k in ("described", "rendered", "hard", "between", "easy")}
    assert expected <= shown
    kka = summary["auc"]["kka"]
    assert f"{kka['mean']:.4f}\u00a0±\u00a0{kka['std']:.4f}" in page.text
    assert summary["config_hash"] in page.text
    assert not any(sentence in page.text for sentence in FULL)


def test_names_only_the_reasons_for_which_something_was_left_out(write_fake_run):
    folder, summary = write_fake_run()
    assert "normals (3 more left out: duplicate)" in " ".join(render(folder).text.split())
    for dropped, said in (
        (
            {"unreadable": 2, "too_large": 0, "duplicate": 1},
            "(2 more left out: unreadable, 1 more left out: duplicate)",
        ),
        ({"unreadable": 0, "too_large": 0, "duplicate": 0}, ""),
        ({}, ""),
    ):
        (folder / "summary.json").write_text(json.dumps(summary | {"dropped": dropped}))
        text = " ".join(render(folder).text.split())
        assert ("left out" in text) is bool(said)
        assert said in text


def test_escapes_what_the_language_model_wrote(write_fake_run):
    evil = """<script>alert("1")</script><img src=x onerror='alert(2)'> & {{ 7 * 7 }}"""
    folder, _ = write_fake_run(text=evil)
    page = render(folder)
    assert not [tag for tag, _ in page.tags if tag == "script"]
    assert "x" not in page.attributes("src")
    assert not page.attributes("onerror")
    assert page.text.count(evil) == 3 * 24  # as text under each image of the grids
    assert sum(evil in title for title in page.attributes("title")) == 3 * 24 + 100


def test_escapes_errors_of_the_renderer(write_fake_run):
    folder, _ = write_fake_run(drawable=False, trained=False)
    path = folder / "records" / "renderings.parquet"
    table = pq.read_table(path)
    at = table.column_names.index("error")
    pq.write_table(table.set_column(at, "error", [["<b>out</b> of memory"] * len(table)]), path)
    page = render(folder)
    assert "<b>out</b> of memory" in page.text


def test_shows_small_images_as_they_were_drawn(write_fake_run):
    folder, _ = write_fake_run(rounds=1, lines=64, trained=False)
    render(folder)
    html = (folder / "report.html").read_text()
    renderings = {r["id"]: r["image"] for r in pq.read_table(folder / "records" / "renderings.parquet").to_pylist()}
    verdicts = pq.read_table(folder / "records" / "verdicts.parquet").to_pylist()
    hard = min((v for v in verdicts if v["label"] == "hard"), key=lambda v: v["hardness"])
    assert pictures.exact(renderings[hard["id"]], "x").source in html


def test_grids_are_in_the_order_they_promise(write_fake_run):
    folder, _ = write_fake_run()
    page = render(folder)
    verdicts = pq.read_table(folder / "records" / "verdicts.parquet").to_pylist()
    order = [alt.removeprefix("drawn image ") for alt in page.attributes("alt") if alt.startswith("drawn image")]
    hardness = {v["id"]: v["hardness"] for v in verdicts}
    label = {v["id"]: v["label"] for v in verdicts}
    assert [label[i] for i in order] == ["hard"] * 24 + ["easy"] * 24 + ["normal_like"] * 24
    hard, easy = [hardness[i] for i in order[:24]], [hardness[i] for i in order[24:48]]
    assert hard == sorted(hard)
    assert hard[0] == min(h for i, h in hardness.items() if label[i] == "hard")
    assert easy == sorted(easy, reverse=True)
    assert easy[0] == max(hardness.values())


@pytest.mark.parametrize(
    ("options", "sentences"),
    [
        ({"rounds": 0, "trained": False}, {"No round was run", "No line was written", "No image was kept"}),
        (
            {"rounds": 1, "trained": False},
            {"was not trained in this run: there was no round after", "One round was run"},
        ),
        ({"shift": 100.0}, {"No drawn image was hard", "No drawn image was normal-like", "there were too few others"}),
        ({"shift": -100.0}, {"No drawn image was easy", "No drawn image was hard"}),
        (
            {"drawable": False, "trained": False},
            {"No image was drawn, so there is no hardness", "No image was kept", "nothing to compare it with"},
        ),
        ({"trained": False}, {"every round after the zero-th stalled", "Round 2 was stalled: 3 pairs"}),
        ({"seeds": 1}, {"Only one seed was run"}),
        ({"lines": 1, "rounds": 2, "trained": False}, {"Round 1 was stalled"}),
    ],
)
def test_says_what_there_is_not(write_fake_run, options, sentences):
    page = render(write_fake_run(**options)[0])
    assert not [sentence for sentence in sentences if sentence not in page.text]
    assert "nan" not in re.findall(r"\w+", page.text.lower())


def test_says_where_the_images_had_no_part_in_the_figures(write_fake_run):
    folder, summary = write_fake_run()
    caution = "has KKA's very figures, seed by seed"
    assert caution not in render(folder).text
    kka = summary["detectors"][summary["detector"]]["kka"]
    summary["detectors"][summary["detector"]]["noise"] = kka
    (folder / "summary.json").write_text(json.dumps(summary))
    page = render(folder)
    assert f"The control noise {caution}" in page.text
    assert "Every fit gives the same figure" not in page.text
    summary["auc"]["kka"]["per_seed"] = kka["per_seed"][:1] * len(kka["per_seed"])
    (folder / "summary.json").write_text(json.dumps(summary))
    assert "Every fit gives the same figure" in render(folder).text


def test_fits_that_are_all_equal_have_no_spread(write_fake_run):
    folder, summary = write_fake_run()
    assert "the mean of 3 fits to the same images. What follows ± is their standard deviation" in render(folder).text
    for spread in (*summary["auc"].values(), *(s for row in summary["detectors"].values() for s in row.values())):
        spread |= {"per_seed": [spread["mean"]] * 3, "std": 1.4e-16}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = render(folder)
    shown = [*page.attributes("aria-label"), page.text]
    assert not [text for text in shown if "±" in text]
    assert "the mean of 3 fits to the same images." in page.text
    assert "the same in every fit" in page.text


def test_a_run_without_rounds_after_the_zeroth_has_no_set_of_kka_s(write_fake_run):
    folder, summary = write_fake_run(rounds=1, trained=False)
    for row in summary["detectors"].values():  # both arms are of one set, as `evaluation` makes them
        if "kka" in row:
            row["zeroth"] = row["kka"]
    summary["auc"]["zeroth"] = summary["auc"]["kka"]
    (folder / "summary.json").write_text(json.dumps(summary))
    page = render(folder)
    body = page.text.replace(f"{summary['name']} – KKA report", "").replace("KKA run", "")
    assert "KKA" not in body
    assert not [label for label in page.attributes("aria-label") if "KKA" in label]
    heads = [
        " ".join(head.split())
        for head in re.findall(r'<th scope="col" class="number">(.*?)</th>', (folder / "report.html").read_text())
    ]
    assert [head.partition("<")[0] for head in heads[:4]] == [
        *("normals only", "zero-th iteration", "noise (control)", "CutPaste (control)"),
    ]
    assert "With the zero-th iteration's 100 kept images it reaches" in page.text
    assert "One round was run, the zero-th, without preference training" in page.text


def test_one_image_is_counted_in_the_singular(write_fake_run):
    folder, summary = write_fake_run(rounds=1, lines=32, trained=False)
    summary |= {"normals": 1, "test": {"normals": 3, "anomalies": 1}}
    (folder / "summary.json").write_text(json.dumps(summary))
    text = " ".join(render(folder).text.split())
    assert all(words in text for words in ("data · 1 normal (", "3 normal and 1 anomalous test image ·"))


def test_without_test_anomalies_shows_threshold_and_normals_to_review(write_fake_run):
    folder, _ = write_fake_run(anomalies=False)
    page = render(folder)
    assert "no test anomalies" in page.text
    assert {3.1416, 0.1} <= set(page.data)
    # Of ten validation normals one lies above their 95 % quantile: what was asked for is not what there is.
    assert "lets 10 % of the validation normals be called so by mistake" in page.text
    assert "AUC on the test images" not in page.text
    review = [alt for alt in page.attributes("alt") if alt.startswith("validation normal")]
    assert review[0] == "validation normal normal-00000"
    assert len(review) == 24
    assert sum("flagged" in (c or "") for c in page.attributes("class")) == 7


def test_truth_is_shown_where_there_is_one(write_fake_run):
    folder, summary = write_fake_run(rounds=1, lines=32, trained=False)
    assert "What the images show in truth" in render(folder).text
    del summary["truth"]
    (folder / "summary.json").write_text(json.dumps(summary))
    page = render(folder)
    assert "What the images show in truth" not in page.text
    assert "#truth" not in page.attributes("href")


def test_768_drawn_images_make_less_than_3_megabytes(write_fake_run):
    folder, summary = write_fake_run(lines=350)
    assert sum(r["rendered"] for r in summary["rounds"]) >= 768
    assert write_report(folder).stat().st_size < 3_000_000


def test_is_written_whole_or_not_at_all(write_fake_run, monkeypatch):
    folder, _ = write_fake_run(rounds=1, lines=32, trained=False)
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(kka_ray.report.Path, "rename", fail)
    with pytest.raises(kka_ray.report.ResourceError, match="disk full"):
        write_report(folder)
    assert (folder / "report.html").read_bytes() == first
    assert not list(folder.glob(".report*"))


def test_two_reports_at_once_are_both_written(write_fake_run, monkeypatch):
    folder, _ = write_fake_run(rounds=1, lines=32, trained=False)
    write = Path.write_text

    def write_while_another_does(path, *args, **kwargs):
        monkeypatch.setattr(Path, "write_text", write)
        done = write(path, *args, **kwargs)
        other = write_report(folder).read_bytes()
        assert other == path.read_bytes()
        return done

    monkeypatch.setattr(Path, "write_text", write_while_another_does)
    assert write_report(folder).read_text().endswith("</html>")
    assert not list(folder.glob(".report*"))


def test_an_unfinished_or_damaged_run_is_an_error_that_says_so(write_fake_run, tmp_path):
    with pytest.raises(StoreError, match=r"config\.yaml"):
        write_report(tmp_path)
    folder, _ = write_fake_run(rounds=1, lines=32, trained=False)
    (folder / "records" / "verdicts.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(StoreError, match=r"verdicts\.parquet"):
        write_report(folder)
    (folder / "summary.json").unlink()
    with pytest.raises(StoreError, match="kka resume"):
        write_report(folder)
    assert not (folder / "report.html").exists()


def test_reading_says_in_how_many_seeds_kka_is_better(write_fake_run):
    _, summary = write_fake_run(rounds=1, lines=32, trained=False)
    baseline = summary["auc"]["baseline"]["per_seed"]
    worse = [baseline[0] - 0.01, baseline[1] + 0.02, baseline[2] + 0.02]
    summary["auc"]["kka"] |= {"per_seed": worse, "mean": float(np.mean(worse))}
    text = wording.reading(summary, {})
    assert "a change of +0.0100, better in 2 of 3 fits" in text


def test_unique_lines_are_said_to_be_what_is_counted(write_fake_run):
    folder, _ = write_fake_run(rounds=2, lines=32)
    lines = ["a red flower", "a red flower", "a blue flower"]  # one of three differs from all others, two are different
    assert f"{unique_share(lines):.2f}" == "0.67"
    assert "different lines as a share of all" in render(folder).text


def test_reading_says_what_became_of_the_diversity(write_fake_run):
    _, summary = write_fake_run(rounds=2, lines=32, trained=False)
    assert "the diversity of the lines went from 0.41 to 0.38" in wording.reading(summary, {})
    summary["rounds"][1]["diversity"] = 0.408
    assert "the diversity of the lines stayed at 0.41" in wording.reading(summary, {})


def test_words_of_preference_training_and_budget(write_fake_run):
    folder, _ = write_fake_run()
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["preference"]["rejected"] = ["easy", "normal_like", "guarded"]
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    page = " ".join(render(folder).text.split())
    assert "preferred to easy ones, to normal-like ones and to those that the guard refused." in page
    assert "5.0 % of the normals (budget 100, the share that the configuration asks for)" in page
    assert re.search(r"easy beyond [\d.]+ The outermost bars hold .* of the auditor\.", page)
    assert [wording.listed(list("abc")[:n]) for n in range(4)] == ["", "a", "a and b", "a, b and c"]


def test_cautions_name_a_control_that_does_as_well(write_fake_run):
    _, summary = write_fake_run(rounds=2, lines=32, trained=False)
    assert not any("does at least as well as KKA" in c for c in wording.cautions(summary))
    summary["detectors"]["simplenet"]["noise"]["mean"] = summary["auc"]["kka"]["mean"]
    assert any("The control noise does at least as well as KKA" in c for c in wording.cautions(summary))


def test_a_detector_that_ignores_anomalies_as_headline(write_fake_run):
    folder, summary = write_fake_run(rounds=1, lines=32, trained=False)
    summary["detector"] = "knn"
    summary["auc"] = {"baseline": summary["detectors"]["knn"]["baseline"], "zeroth": None, "kka": None}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = render(folder)
    assert "It ignores anomalies" in page.text
    assert "No drawn image was kept" not in page.text


@pytest.mark.parametrize(("auc", "said"), [(0.55, True), (0.71, False), (None, False)])
def test_texts_that_tell_little_of_hardness_are_said(write_fake_run, auc, said):
    folder, summary = write_fake_run()
    summary["text_signal"]["hard_auc"] = auc
    (folder / "summary.json").write_text(json.dumps(summary))
    page = render(folder).text
    assert ("which are rejected can hardly be told from their texts" in page) == said
    assert ("a linear model tells whether a line becomes a hard image or is rejected" in page) == (auc is not None)


@pytest.mark.parametrize(("normals", "said"), [(18, True), (19, False), (None, False)])
def test_a_threshold_of_too_few_normals_is_said(write_fake_run, normals, said):
    folder, summary = write_fake_run(rounds=1, lines=32)
    summary |= {"validation_normals": normals, "false_positive_rate": 0.05}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = render(folder).text
    assert ("about one new normal image in 19 will exceed" in page) == said
    assert ("takes 19 of them" in page) == said


def test_an_empty_band_is_said(write_fake_run):
    folder, summary = write_fake_run(rounds=1, lines=32, trained=False)
    summary["audit"] |= {"band_lower": 7.0, "band_empty": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    page = render(folder)
    assert "The hard band is empty" in page.text
    assert not [1 for tag, attrs in page.tags if tag == "rect" and attrs.get("class") == "band"]


@pytest.mark.parametrize(
    ("section", "key", "value", "drawn"),
    [("render", "normals", 64, True), ("render", "normals", 3, False), ("confusion", "drawn_normals", False, False)],
)
def test_says_what_the_normals_of_the_auditor_are(write_fake_run, section, key, value, drawn):
    folder, _ = write_fake_run(rounds=1, lines=32, trained=False)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config[section][key] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    text = " ".join(render(folder).text.split())
    assert "validation normals (1,200)" in text
    assert ("real ones and drawings of normal captions, and either kind counts half" in text) == drawn
    assert ("Every validation normal is there once for each fold" in text) == (not drawn)


def test_histogram_says_what_lies_outside():
    drawn = {"hard": [3.5] * 10, "between": [], "easy": [*np.linspace(7, 12, 89), 400.0], "normal_like": []}
    chart = charts.histogram(np.linspace(-2, 3, 50), drawn, 2.8, 5.0, 6.0)
    assert chart.drawn_outside == sum(h > chart.high for h in drawn["easy"]) >= 1
    assert chart.normals_outside == 0
    assert chart.high < 20  # one image far out does not squeeze the others


def test_map_keeps_directions_and_puts_what_is_far_at_the_edge():
    svg = charts.latent({"hard": [(1.0, 0.0), (0.0, 100.0)]}, 10.0, "map")
    (path,) = re.findall(r'class="mark hard" d="([^"]+)"', svg)
    (x1, y1), (x2, y2) = [tuple(map(float, p)) for p in re.findall(r"M([\d.]+) ([\d.]+)", path)]
    assert y1 == 180.0
    assert x1 - 180 == pytest.approx(176 * math.log(2) / math.log(11), abs=0.1)
    assert (x2, y2) == (180.0, 4.0)


def test_large_images_are_reduced():
    image = np.random.default_rng(0).integers(0, 256, (300, 500, 3), np.uint8)
    picture = pictures.exact(encode_png(image), "x")
    assert (picture.width, picture.height, picture.crisp) == (192, 115, False)
    assert picture.source.startswith("data:image/jpeg;base64,")
    small = encode_png(np.zeros((64, 64, 3), np.uint8))
    assert pictures.exact(small, "x").crisp
    assert Image.open(io.BytesIO(small)).size == (pictures.exact(small, "x").width, 64)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.88, 0.93, [0.88, 0.89, 0.9, 0.91, 0.92, 0.93]), (3, 3, [3])],
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high, 5) == expected


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (59.99, "60.0 s"), (3599.9, "1 h 00 min"), (61, "1 min 01 s")]
)
def test_durations(seconds, text):
    assert wording.duration(seconds) == text


def test_what_the_views_bring_is_told_from_what_the_images_bring(write_fake_run):
    folder, summary = write_fake_run()
    file = folder / "summary.json"
    summary = json.loads(file.read_text()) | {"views": 4}
    file.write_text(json.dumps(summary))
    caution = "a part of any change is theirs. The control normal_views says how much"
    assert caution in render(folder).text
    kka = summary["detectors"][summary["detector"]]["kka"]
    views = {k: kka[k] - 0.01 if k == "mean" else kka[k] for k in kka}
    views["per_seed"] = [value - 0.01 for value in kka["per_seed"]]
    summary["detectors"][summary["detector"]]["normal_views"] = views
    file.write_text(json.dumps(summary))
    text = render(folder).text
    assert caution not in text
    assert re.search(r"but no image, it reaches [\d.]+.*; from there it is a change of \+0\.0100", text)
    assert "+0.0100 against normals and their views" in text


def test_equal_figures_at_the_ceiling_say_nothing_of_the_images(write_fake_run):
    folder, _ = write_fake_run()
    file = folder / "summary.json"
    summary = json.loads(file.read_text())
    perfect = {"mean": 1.0, "std": 0.0, "per_seed": [1.0, 1.0, 1.0]}
    for arm in ("kka", "noise"):
        summary["detectors"][summary["detector"]][arm] = perfect
    summary["auc"]["kka"] = perfect
    file.write_text(json.dumps(summary))
    assert "very figures, seed by seed" not in render(folder).text

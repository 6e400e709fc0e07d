"""The report as files: what the page holds, how large it may grow, hostile names, pictures, markdown, mistakes."""

import json
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from scipy.stats import t

from mmtrain.config_errors import UserError
from mmtrain.reporting import page, palette
from mmtrain.reporting.contents import Contents, gather, has_ours
from mmtrain.reporting.images import table_figure
from mmtrain.reporting.pictures import embed
from mmtrain.reporting.report import as_markdown, main
from mmtrain.reporting.results import Run, find_runs, write_run
from tests.reporting.runs import FULL, METHODS, SEEDS, write_all, write_full_run, write_laptop_run, write_sample

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> \"'&{{ 7*7 }}"


class Elements(HTMLParser):
    """Every start tag with its attributes, and all text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def count(self, tag: str, name: str) -> int:
        return sum(found == tag and name in attributes.get("class", "").split() for found, attributes in self.tags)


@pytest.fixture(scope="module")
def contents(tmp_path_factory) -> Contents:
    """14 runs: 4 methods x 3 seeds at laptop scale, 2 seeds of RankCLIP at full scale."""
    return gather(find_runs([write_all(tmp_path_factory.mktemp("runs"))]), "Fourteen runs")


@pytest.fixture(scope="module")
def html(contents) -> str:
    return page.render(contents)


def section(html: str, name: str) -> str:
    return re.search(rf'<section id="{name}".*?</section>', html, re.DOTALL)[0]


def test_page_is_small_and_refers_to_nothing_outside(html) -> None:
    assert len(html.encode()) < 5_000_000
    addresses = [
        attributes[name]
        for _, attributes in Elements(html).tags
        for name in ("src", "href", "action", "data", "srcset", "poster")
        if attributes.get(name)
    ]
    assert len(addresses) > 60 and all(address.startswith(("#", "data:")) for address in addresses)
    styles_and_scripts = "".join(re.findall(r"<(?:style|script>).*?</(?:style|script)>", html, re.DOTALL))
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttpRequest|import\(", styles_and_scripts)
    assert "default-src 'none'" in html


def test_paper_tables_hold_full_scale_runs_only(html, contents) -> None:
    """Mean, interval and difference of two seeds are computed here again; laptop runs stand in their own section."""
    paper, laptop = section(html, "paper-1"), section(html, "laptop")
    values = [100 * FULL["zero_shot_top1"] * gain for gain in (1.0, 1.03)]
    mean = statistics.fmean(values)
    half = t.ppf(0.975, 1) * statistics.stdev(values) / 2**0.5
    shown = Elements(paper).text
    assert f"{mean:.2f} ± {half:.2f} ▲ +{mean - 10.16:.2f} better within" in shown
    assert "rn_small" not in paper and "CyCLIP" in paper, "reported rows of CyCLIP, but no run of it"
    assert Elements(laptop).count("tr", "ours") == len(METHODS) * 4 and Elements(laptop).count("tr", "reported") == 0
    assert "never comparable with the paper" in laptop
    (paper_tables,) = contents.papers
    assert paper.count("<details") == len(paper_tables.tables) + len(paper_tables.measured)
    for status in ("exact", "digitised", "missing", "qualitative"):
        assert f'class="badge {status}"' in paper


def test_runs_missing_sets_claims_and_curves_are_all_there(html, contents) -> None:
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', html)[1])
    assert [run["method"] for run in data["runs"]] == [run.method for run in contents.runs]
    assert data["methods"] == ["RankCLIP", "CLIP", "CyCLIP", "ALIP"], "the paper's own first, then the paper's order"
    loss = next(chart for chart in data["charts"][1] if chart["metric"] == "train/loss")
    assert len(loss["curves"]) == len(METHODS) * len(SEEDS)
    assert all(len(data["steps"][steps]) == len(values) == 180 for _, steps, values in loss["curves"])
    assert Elements(section(html, "missing")).text.count("ROOT/coco/val2017.tar") == 1
    assert "https://example.org/cc3m-0.tar" in section(html, "runs"), "configs are shown, as text"
    claims = Elements(section(html, "claims")).text
    by_method = {
        method: [run for run in contents.runs if run.method == method][-3:] for method in ("RankCLIP", "CyCLIP")
    }
    ours, theirs = ([100 * run.metrics["test/twemoji_style/t2i_r1"] for run in runs] for runs in by_method.values())
    differences = [own - rival for own, rival in zip(ours, theirs, strict=True)]
    mean, half = statistics.fmean(differences), t.ppf(0.975, 2) * statistics.stdev(differences) / 3**0.5
    row = f"holdsCyCLIP{statistics.fmean(ours):.2f} %{statistics.fmean(theirs):.2f} %{mean:+.2f}"
    assert f"{row}{mean - half:+.2f} to {mean + half:+.2f}, 3 seeds" in claims
    assert re.search(r"smaller modality gapFigure 6.*CLIP0\.\d{3}0\.\d{3}[+-]0\.\d{3}", claims), "not in percent"


def test_hostile_names_stay_text(tmp_path) -> None:
    folder = write_laptop_run(tmp_path / "runs" / "a", HOSTILE, seed=0, figures=1)
    content = json.loads((folder / "results.json").read_text())
    content |= {"run": HOSTILE, "paper": HOSTILE, "setting": {"backbone": HOSTILE}, "missing": {HOSTILE: HOSTILE}}
    content["metrics"] = {f"test/{HOSTILE.replace('/', '')}/x": 0.1}
    content["figures"][0]["title"] = HOSTILE
    (folder / "results.json").write_text(json.dumps(content))
    (folder / "config.yaml").write_text(f"name: {HOSTILE}")
    found = Elements(page.render(gather(find_runs([tmp_path]), HOSTILE)))
    assert [tag for tag, _ in found.tags].count("script") == 2, "its own data and its own code"
    assert not [attributes for _, attributes in found.tags if any(name.startswith("on") for name in attributes)]
    assert found.text.count(HOSTILE) >= 6, "also the braces of the template language"
    assert not [tag for tag, attributes in found.tags if attributes.get("src") == "x"]


def test_pictures_get_what_the_page_leaves(contents, html, monkeypatch) -> None:
    """A smaller limit costs resolution first, then pictures, the later seeds before the first."""
    bare = len(html.encode()) - sum(len(address) for address in re.findall(r"data:image/png[^\"]*", html))
    monkeypatch.setattr(page, "PAGE_LIMIT", bare + 200_000)
    small = page.render(contents)
    assert len(small.encode()) <= bare + 200_000
    left = [contents.runs[int(place)].seed for place in re.findall(r'<figure data-run="(\d+)"', small)]
    assert 0 < len(left) < 48 and left.count(0) == 16 and f"{48 - len(left)} more pictures" in small


@pytest.mark.parametrize("room", [10_000, 100_000, 2_000_000])
def test_embedded_pictures_keep_within_the_room(room, tmp_path) -> None:
    write_sample(tmp_path / "sample.png", seed=0)
    (tmp_path / "broken.png").write_bytes(b"no picture")
    addresses = embed([tmp_path / "broken.png", *[tmp_path / "sample.png"] * 12], room)
    kept = [address for address in addresses if address]
    assert addresses[0] is None and len(kept) >= 1 and sum(map(len, kept)) <= room
    assert addresses[1 : len(kept) + 1] == kept, "the first ones are kept"


def test_command_writes_page_markdown_and_images(tmp_path, capsys) -> None:
    shutil.rmtree(write_laptop_run(tmp_path / "runs" / "emoji", "CLIP", seed=0) / "logs")
    write_full_run(tmp_path / "runs" / "cc3m", "RankCLIP", seed=0, gain=1.02)
    out = tmp_path / "out"
    assert main([str(tmp_path / "runs"), "--out", str(out), "--title", "Two runs"]) == 0
    assert str(out / "report.html") in capsys.readouterr().out
    contents = gather(find_runs([tmp_path / "runs"]), "Two runs")
    images = sorted((out / "images").glob("*.png"))
    assert len(images) == len(contents.tables()) + len(contents.charts)
    for path in images:
        with Image.open(path) as picture:
            assert min(picture.size) > 250 and len(picture.convert("L").getcolors()) > 20, path
    text = (out / "report.md").read_text()
    assert text.startswith("# Two runs\n") and text.count("| RankCLIP | ours |") >= 3
    assert all((out / path).is_file() for path in re.findall(r"!\[.*?\]\((.*?)\)", text))
    assert text.index("never comparable") < text.index("### unseen_concepts")


def test_images_of_tables_tell_ours_and_the_sign_of_a_difference(contents) -> None:
    table = next(table for table in contents.papers[0].tables if has_ours(table))
    texts = {text.get_text(): text for text in table_figure(table).axes[0].texts}
    difference = next(text for content, text in texts.items() if content.startswith("▲ +"))
    assert difference.get_color() == palette.BETTER[0]
    ours = next(text for content, text in texts.items() if content.endswith("(ours)"))
    assert ours.get_fontweight() == "bold" and texts["CyCLIP"].get_fontweight() == "normal"


def test_run_with_results_only(tmp_path) -> None:
    """Neither curves, figures, config nor claims, and a paper that nobody reported."""
    run = Run(tmp_path / "run", "unknown", "Ours", "first", "full", metrics={"test/a/zero_shot_top1": 0.5})
    write_run(run)
    contents = gather(find_runs([tmp_path]), "One run")
    shown = Elements(page.render(contents)).text
    assert "50.00" in shown and "1 run (1 full scale) of 1 method" in shown and "Training curves" not in shown
    assert "| Ours | ours | 50.00 |" in as_markdown(contents, [])


def test_mistakes_are_told(tmp_path) -> None:
    with pytest.raises(UserError, match="python -m mmtrain test"):
        main([str(tmp_path)])
    folder = write_laptop_run(tmp_path / "run", "CLIP", seed=0, figures=0)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--out .*file"):
        main([str(folder), "--out", str(tmp_path / "file")])
    (tmp_path / "reproduce.json").write_text('{"claims": [{"claim": "x"}]}')
    with pytest.raises(UserError, match=r"reproduce\.json: cannot be read as claims .*'metric'"):
        main([str(folder), "--out", str(Path(tmp_path) / "out")])


def write_simulated_run(folder: Path, method: str, seed: int, score: float) -> None:
    metrics = {f"test/wipe/{cell}": score for cell in ("no_perturb", "perturb_after_contact", "all")}
    bounds = {f"{key}{end}": score + by for key in metrics for end, by in (("_low", -0.06), ("_high", 0.03))}
    run = Run(folder, "rdp", method, folder.name, "simulation", seed=seed, step=3000, metrics=metrics | bounds)
    run.setting = {"backbone": "UNet 32-64-128", "train_data": "simulation"}
    run.figures = [{"file": "figures/rollout.mp4", "title": "Rollout", "kind": "video"}]
    write_run(run)


def test_simulated_runs_stand_under_the_robot_s_rows_without_differences(tmp_path) -> None:
    write_simulated_run(tmp_path / "rdp", "RDP (Force)", 0, 0.95)
    for seed in (0, 1):
        write_simulated_run(tmp_path / f"dp{seed}", "DP", seed, 0.4 + 0.1 * seed)
    contents = gather(find_runs([tmp_path]), "Simulation")
    html = page.render(contents)
    paper, shown = section(html, "paper-1"), Elements(section(html, "paper-1")).text
    assert "0.95 [0.89, 0.98]" in shown and 'data-interval="[0.89, 0.98]"' in paper and "0.45 ± 0.64" in shown
    assert "the reported numbers are from the real robot" in shown and "data-reported" not in paper
    assert "more pictures" not in html and "3 runs (3 simulation) of 2 methods" in html
    text = as_markdown(contents, [])
    assert re.search(
        r"\| RDP \(Force\) \| reported \| 0\.95 .*\n(.*\n)*\| RDP \(Force\) † \| simulation \| 0\.95 \[", text
    )
    table = next(table for table in contents.papers[0].tables if has_ours(table))
    texts = [drawn.get_text() for drawn in table_figure(table).axes[0].texts]
    assert "RDP (Force) (simulation)†" in texts and "0.95 [0.89, 0.98]" in texts

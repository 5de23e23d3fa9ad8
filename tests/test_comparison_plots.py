import pytest
from matplotlib.figure import Figure

from soundwave.eval.compare import write
from soundwave.eval.comparison import Comparison, compare_runs
from soundwave.eval.comparison_plots import column_styles
from soundwave.eval.published import published_models
from tests.test_compare import PNG, entry, foundation, part, run


@pytest.fixture
def pictures(monkeypatch):
    """The figures that are saved during a test, in order."""
    saved, save_figure = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: saved.append(self) or save_figure(self, *a, **k))
    return saved


def legend_of(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_no_radar_without_air_bench(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    (output / "radar.png").write_bytes(PNG)  # of an earlier comparison
    files = write(output, compare_runs([run("a", entry("set"))]))
    assert [file.name for file in files] == ["compare.md", "compare.csv", "bars.png"]
    assert not (output / "radar.png").exists()


def test_pictures_show_the_values(tmp_path):
    pictures = []
    for shift in (0.0, 0.1):
        comparison = compare_runs([run("a", foundation(shift))])
        write(tmp_path, comparison)
        pictures.append([(tmp_path / name).read_bytes() for name in ("radar.png", "bars.png")])
    assert pictures[0][0] != pictures[1][0] and pictures[0][1] != pictures[1][1]


def test_what_belongs_beside_a_headline_has_a_panel(tmp_path, pictures):
    also = {"similarity_std": part(0.1), "shuffled_similarity": part(0.2)}
    write(tmp_path, compare_runs([run("mine", entry("similarity", "similarity", 0.3, also=also))]))
    titles = [axis.get_title(loc="left").split("\n")[1] for axis in pictures[0].axes]
    assert titles == ["similarity", "shuffled_similarity"]


def test_no_two_columns_look_the_same():
    styles = column_styles(Comparison([f"run{n}" for n in range(25)], published_models(), [], []))
    assert len({(style.colour, style.line) for style in styles.values()}) == len(styles)
    assert len({(style.colour, style.hatch) for style in styles.values()}) == len(styles)


def test_runs_stand_out_in_the_radar(tmp_path, pictures):
    write(tmp_path, compare_runs([run("a", foundation())], published_models()))
    _, radar = pictures
    ours, *others = radar.axes[0].lines
    assert all(ours.get_linewidth() > 2 * line.get_linewidth() for line in others) and len(others) == 8
    assert all(ours.get_zorder() > line.get_zorder() for line in others)
    assert legend_of(radar)[:2] == ["a", "Soundwave (published)"]


def test_a_run_without_a_figure_is_named_in_the_pictures(tmp_path, pictures):
    unread = foundation() | {"value": None, "interval": None}
    unread |= {kind: {name: part(None) for name in unread[kind]} for kind in ("groups", "areas")}
    comparison = compare_runs([run("a", foundation()), run("lost", unread)])
    write(tmp_path, comparison)
    for picture in pictures:
        assert legend_of(picture) == ["a"]
        assert picture.get_suptitle().startswith("Not drawn, for want of a figure: lost.")
    assert [text.get_text() for text in pictures[0].axes[0].texts] == ["50.0", "none"]
    assert any("undefined (none) for lost: 23 of its 23 figures" in note for note in comparison.notes)
    only = write(tmp_path, compare_runs([run("lost", unread)]))
    assert [file.name for file in only] == ["compare.md", "compare.csv"]


def test_bars_of_nothing_but_zeros_start_at_zero(tmp_path, pictures):
    write(tmp_path, compare_runs([run("a", entry("set", value=0.0)), run("b", entry("set", value=0.0))]))
    assert pictures[0].axes[0].get_ylim()[0] == 0


def test_bars_show_what_the_paper_prints_in_two_ways(tmp_path, pictures):
    chat = entry("air_bench_chat", "judge_score", 6.0, areas={"Speech": part(6.2)})
    write(tmp_path, compare_runs([run("mine", chat)], ["Soundwave"]))
    assert "6.41 (Table 17)\n6.51 (Table 7)" in [text.get_text() for text in pictures[0].axes[1].texts]

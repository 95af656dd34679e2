"""The report's numbers against plain definitions, and its page in a browser."""

from __future__ import annotations

import re
import shutil
import subprocess

import numpy as np
import pytest

from mogul.core.errors import ConfigError
from mogul.observe import numbers
from mogul.observe.compare import comparison
from mogul.observe.report import page_of
from mogul.observe.report_devices import (
    default_devices,
    device_table,
    each_device_table,
    placements,
    with_given,
)
from mogul.observe.uniform import imbalance_chart
from mogul.place.solve import Wish, place
from mogul.spec.picks import trace_of_picks
from mogul.spec.trace import ModelStamp, Trace


def made_trace(groups=1, seed=0, tokens=600):
    rng = np.random.default_rng(seed)
    stamp = ModelStamp(
        name="made", family="moge", num_layers=3, num_experts=16, top_k=4, num_groups=groups,
        hidden_size=8,
    )  # fmt: skip
    score = rng.normal(0, 1, (3, 16)) + rng.gumbel(size=(tokens, 3, 16))
    if groups == 1:
        ids = np.argsort(-score, axis=-1)[..., :4]
    else:
        ids = score.reshape(tokens, 3, 4, 4).argmax(-1) + 4 * np.arange(4)
    trace = trace_of_picks(ids, stamp, batch_sizes=(4, 16))
    half = trace_of_picks(ids[: tokens // 2], stamp).count
    arrays = {**trace.arrays, "task_count": np.stack([half, trace.count - half])}
    return Trace(trace.meta.replace(tasks=("code", "prose")), arrays)


def test_numbers_by_hand():
    ids = np.array([[[0, 1]], [[0, 2]], [[0, 4]], [[0, 1]]])  # 4 is a null pick
    stamp = ModelStamp(name="m", family="moge", num_layers=1, num_experts=4, top_k=2, hidden_size=8)
    trace = trace_of_picks(ids, stamp, batch_sizes=(2,))
    found = numbers.layer_numbers(trace)
    assert found.busiest[0] == pytest.approx(4 / (7 / 4))
    assert (found.dead[0], found.cold[0]) == (1, 1)
    assert found.null_share[0] == pytest.approx(1 / 8)
    assert numbers.mean_distinct(trace, 0)[0] == 2.5
    assert numbers.pair_probability(trace, 0)[0, 1] == 0.5
    assert numbers.whole_rho(trace, 2) == pytest.approx((6 / 3.5, 6 / 3.5))


@pytest.mark.parametrize("groups", [1, 4])
def test_few_tokens_are_told_beside_what_chance_alone_makes(groups):
    assert not numbers.summary(made_trace(groups)).notes
    trace = made_trace(groups, tokens=20)
    (note,) = numbers.summary(trace).notes
    assert "5 rows an expert are few" in note
    rng = np.random.default_rng(1)
    score = rng.random((4000, 20, groups, 16 // groups))
    picked = score.argsort(-1).argsort(-1) < 4 // groups  # as many of each group, all as likely
    busiest = picked.reshape(4000, 20, 16).sum(1).max(1).mean() / 5
    assert numbers.busiest_by_chance(trace) == pytest.approx(busiest, rel=0.04)


def test_pairs_leave_the_trace_as_it_is():
    trace = made_trace()
    before = trace.arrays["coactivation"].copy()
    numbers.pair_probability(trace, 0)
    np.testing.assert_array_equal(trace.arrays["coactivation"], before)


def test_transitions_of_a_copying_layer_are_guessed():
    rng = np.random.default_rng(0)
    first = np.argsort(rng.random((500, 16)), axis=1)[:, :1]
    stamp = ModelStamp(
        name="m", family="moge", num_layers=2, num_experts=16, top_k=1, hidden_size=8
    )
    copying = trace_of_picks(np.stack([first, (first + 3) % 16], axis=1), stamp)
    assert numbers.transition_recall(copying, 0, 1) == 1.0
    assert numbers.frequency_recall(copying, 0, 1) < 0.15


def test_transitions_over_chance():
    ids = np.array([[[0], [1]], [[0], [1]], [[1], [0]], [[2], [2]]])
    stamp = ModelStamp(name="m", family="moge", num_layers=2, num_experts=4, top_k=1, hidden_size=8)
    lift = numbers.transition_lift(trace_of_picks(ids, stamp), 0)
    assert lift[0].tolist() == [0.0, 2.0, 0.0, 0.0]  # always 1 next; by chance half of the time
    assert lift[2, 2] == 4.0
    assert lift[3].tolist() == [0.0] * 4  # never seen: nothing to say


def test_a_given_placement_is_shown_for_its_devices():
    trace = made_trace()
    mine = place(trace, Wish(num_devices=4, method="contiguous"))
    found = with_given(trace, (2,), [mine])
    assert list(found) == [2, 4]
    assert found[4] is mine
    rows = {row[0]: row for row in device_table(trace, found).rows}
    assert rows[4][1] == rows[4][3]  # contiguous: nothing gained
    assert rows[2][3] < rows[2][1]
    other = mine.replace(model=mine.model.replace(num_layers=9))
    with pytest.raises(ConfigError, match="another model"):
        with_given(trace, (), [other])


def test_specialisation_of_separate_and_equal_tasks():
    trace = made_trace()
    count = np.zeros((2, 3, 16), dtype=np.int64)
    count[0, :, :8] = count[1, :, 8:] = 5
    apart = Trace(trace.meta, {**trace.arrays, "task_count": count})
    assert numbers.specialisation(apart) == pytest.approx([1.0, 1.0, 1.0])
    count[:] = 5
    assert numbers.specialisation(apart) == pytest.approx([0.0, 0.0, 0.0])


def test_devices_of_a_moge_are_its_legal_ones_and_balanced():
    trace = made_trace(groups=4)
    assert default_devices(trace) == (2, 4)
    assert default_devices(made_trace()) == (2, 4, 8)
    table = device_table(trace, placements(trace, (2, 4, 8)))
    assert [row[:4] for row in table.rows[:2]] == [(2, 1.0, 1.0, 1.0), (4, 1.0, 1.0, 1.0)]
    assert [row[6] for row in table.rows[:2]] == [0.0, 0.0]
    assert table.rows[2][1] > 1.0  # eight devices: uneven, and no placement is offered
    assert table.rows[2][3] is None
    assert "On 8 devices there is no placement of whole groups" in table.notes[-1]


def test_placement_lowers_rho_in_the_table():
    trace = made_trace()
    for _, before, _, after, *_ in device_table(trace, placements(trace, (2, 4))).rows:
        assert after < before


def test_every_device_is_counted_in_the_worst_layer():
    trace = made_trace()
    placement = placements(trace, (4,))[4]
    table = each_device_table(trace, 4, placement)
    rows_LD = trace.count.reshape(3, 4, 4).sum(2)
    worst = int((rows_LD.max(1) / rows_LD.mean(1)).argmax())
    assert f"layer {worst}," in table.title
    assert [row[1] for row in table.rows] == rows_LD[worst].tolist()
    slots_DS = placement.slots_of(worst)
    assert [row[3] for row in table.rows] == trace.count[worst][slots_DS].sum(1).tolist()
    ids_SK = trace.arrays["sample_ids"][:, worst]
    uniform = 16 * (1 - 0.75**16)  # distinct experts of 16 tokens with equal chances
    for column in (2, 4):
        distinct = sum(row[column] for row in table.rows)
        assert len(np.unique(ids_SK)) >= distinct > 0.7 * uniform
        assert all(row[column] <= 4 for row in table.rows)
    assert len(each_device_table(trace, 4, None).rows[0]) == 3


def test_page_has_every_section_once():
    html = page_of(made_trace(groups=4), placements(made_trace(groups=4), (2, 4))).html()
    for title in (
        "Is some expert too busy?", "What do devices wait for?", "Does the router choose?",
        "Who is picked together?", "Can the next layer be guessed?", "Do experts specialise?",
        "Imbalance of uniform routing", "Transitions from layer to layer", "Co-activation",
    ):  # fmt: skip
        assert html.count(f">{title}") == 1, title


def test_comparison_of_equal_and_other_traces():
    one, two = made_trace(seed=0), made_trace(seed=1)
    rows = {row[0]: row for row in comparison(one, one).rows}
    assert rows["distance of the loads, 0..1"][3] == 0.0
    assert rows["busiest expert / mean rows"][3] == 0.0
    assert {r[0]: r for r in comparison(one, two).rows}["distance of the loads, 0..1"][3] > 0.1
    other = Trace(one.meta.replace(layers=(0, 1, 4)), one.arrays)
    with pytest.raises(ConfigError, match="other layers"):
        comparison(one, other)


def test_imbalance_figure_shows_the_papers_mean_and_a_single_bar():
    chart = imbalance_chart(draws=4000)
    top_k, moge = chart.series
    assert float(top_k.name.split()[-1]) == pytest.approx(0.667, abs=0.012)
    assert moge.name == "MoGE, mean IS 0.000"
    assert moge.y[0] == 100.0
    assert sum(top_k.y) == pytest.approx(100.0)


@pytest.mark.full
def test_page_is_drawn_in_chromium(tmp_path):
    browser = shutil.which("chromium") or shutil.which("chromium-browser")
    if browser is None:
        pytest.skip("no Chromium on this machine")
    trace = made_trace()
    page = tmp_path / "report.html"
    page_of(trace, placements(trace, (2, 4))).write(page)
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--virtual-time-budget=8000", "--window-size=900,3000",
    ]  # fmt: skip
    done = subprocess.run(
        [browser, *flags, f"--user-data-dir={tmp_path / 'profile'}",
         f"--screenshot={tmp_path / 'page.png'}", "--dump-dom", page.as_uri()],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    dom = done.stdout
    drawn = len(re.findall(r'class="main-svg"', dom))
    figures = page.read_text().count("<figure>")
    assert figures >= 10
    assert drawn >= figures, f"{drawn} of {figures} figures were drawn"
    assert "Uncaught" not in done.stderr
    assert (tmp_path / "page.png").stat().st_size > 50_000

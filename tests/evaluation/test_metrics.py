import matplotlib
import numpy as np
import pytest

from cl_zoo import plots
from cl_zoo.evaluation import metrics
from tests.oracles import metrics as oracle

matplotlib.use("Agg")
from matplotlib import pyplot

NAMES = (
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "learning_accuracy",
)
NAN_FOR_ONE_TASK = {"backward_transfer", "forgetting", "forward_transfer"}

# Worked by hand: three tasks, two points within each.
R = [[0.1, 0.2, 0.3], [0.9, 0.3, 0.2], [0.6, 0.8, 0.4], [0.7, 0.5, 1.0]]
CURVE = [
    [[0.5, 0.1, 0.1], [0.9, 0.3, 0.2]],  # while task 0 is trained
    [[0.4, 0.6, 0.2], [0.5, 0.7, 0.3]],  # task 1
    [[0.65, 0.3, 0.6], [0.7, 0.9, 0.8]],  # task 2
]


def matrices(n_tasks, *leading):
    return np.random.default_rng(n_tasks).random((*leading, n_tasks + 1, n_tasks))


def curves(n_tasks, points, *leading):
    return np.random.default_rng(10 + n_tasks).random((*leading, n_tasks, points, n_tasks))


def mean(values):
    return sum(values) / len(values) if values else float("nan")


def slow_min_accuracy(curve, matrix):
    n_tasks, lowest = len(curve), []
    for i in range(n_tasks - 1):
        seen = []
        for t in range(i + 1, n_tasks):
            seen.append(matrix[t + 1][i])
            seen += [point[i] for point in curve[t]]
        lowest.append(min(seen))
    return mean(lowest)


def slow_stability_gap(curve, matrix):
    gaps = []
    for t in range(1, len(curve)):
        gaps.append(mean([max(0.0, matrix[t][i] - min(point[i] for point in curve[t])) for i in range(t)]))
    return mean(gaps)


@pytest.mark.parametrize("n_tasks", range(1, 7))
@pytest.mark.parametrize("name", NAMES)
def test_equals_the_oracle(name, n_tasks):
    for matrix in matrices(n_tasks, 5):
        value = getattr(metrics, name)(matrix)
        np.testing.assert_allclose(value, getattr(oracle, name)(matrix), rtol=1e-12, atol=1e-15)
        assert np.isnan(value) == (n_tasks == 1 and name in NAN_FOR_ONE_TASK)


@pytest.mark.parametrize("n_tasks", [1, 2, 4])
@pytest.mark.parametrize("name", NAMES)
def test_leading_axes_are_kept(name, n_tasks):
    many = matrices(n_tasks, 3, 2)
    values = getattr(metrics, name)(many)
    assert values.shape == (3, 2)
    for i in np.ndindex(3, 2):
        np.testing.assert_allclose(values[i], getattr(oracle, name)(many[i]), rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "name,value",
    [
        ("average_accuracy", (0.7 + 0.5 + 1.0) / 3),
        ("average_incremental_accuracy", (0.9 + (0.6 + 0.8) / 2 + (0.7 + 0.5 + 1.0) / 3) / 3),
        ("backward_transfer", ((0.7 - 0.9) + (0.5 - 0.8)) / 2),
        ("forgetting", ((0.9 - 0.7) + (0.8 - 0.5)) / 2),
        ("forward_transfer", ((0.3 - 0.2) + (0.4 - 0.3)) / 2),
        ("learning_accuracy", (0.9 + 0.8 + 1.0) / 3),
    ],
)
def test_worked_by_hand(name, value):
    assert getattr(metrics, name)(R) == pytest.approx(value)
    assert metrics.summary(R)[name] == pytest.approx(value)


def test_forgetting_is_from_the_best_score_before_the_last_task():
    assert metrics.forgetting([[0, 0, 0], [0.5, 0, 0], [0.75, 0.5, 0], [0.25, 0.75, 0]]) == pytest.approx(
        (0.5 - 0.25) / 2
    )


def test_accuracy_after_each_task():
    np.testing.assert_allclose(metrics.accuracy_after_each_task(R), [0.9, 0.7, 2.2 / 3])
    assert metrics.accuracy_after_each_task(matrices(4, 3, 2)).shape == (3, 2, 4)


def test_summary_has_every_number():
    assert set(metrics.summary(R)) == set(NAMES)


def test_min_accuracy_by_hand():
    assert metrics.min_accuracy(CURVE, R) == pytest.approx((0.4 + 0.3) / 2)


def test_min_accuracy_counts_the_ends_of_tasks():
    lower = np.array(R)
    lower[2, 0] = 0.2
    assert metrics.min_accuracy(CURVE, lower) == pytest.approx((0.2 + 0.3) / 2)


def test_stability_gap_by_hand():
    assert metrics.stability_gap(CURVE, R) == pytest.approx(((0.9 - 0.4) + (0 + (0.8 - 0.3)) / 2) / 2)


def slow_anytime(curve, seen):
    """Accuracy at each point of the stream, task by task."""
    found = []
    for t, within in enumerate(curve):
        for p, scores in enumerate(within):
            found.append(mean([score for i, score in enumerate(scores) if seen(t, p, i)]))
    return found


def test_anytime_accuracy_by_hand():
    wanted = [0.5, 0.9, (0.4 + 0.6) / 2, (0.5 + 0.7) / 2, (0.65 + 0.3 + 0.6) / 3, (0.7 + 0.9 + 0.8) / 3]
    np.testing.assert_allclose(metrics.anytime_accuracy(CURVE), wanted)
    assert metrics.average_anytime_accuracy(CURVE) == pytest.approx(sum(wanted) / 6)
    assert metrics.average_anytime_accuracy(CURVE, np.ones(3)) == pytest.approx(np.mean(CURVE))


@pytest.mark.parametrize(("n_tasks", "points"), [(1, 1), (1, 4), (3, 1), (4, 3)])
def test_anytime_accuracy_equals_loops(n_tasks, points):
    many = curves(n_tasks, points, 3, 2)
    values = metrics.average_anytime_accuracy(many)
    assert values.shape == (3, 2) and metrics.anytime_accuracy(many).shape == (3, 2, n_tasks * points)
    early = np.arange(n_tasks) <= np.arange(n_tasks)[:, None] + 1  # a task is seen one turn before its own
    for i in np.ndindex(3, 2):
        slow = slow_anytime(many[i], lambda t, p, task: task <= t)
        np.testing.assert_allclose(metrics.anytime_accuracy(many)[i], slow, rtol=1e-12)
        np.testing.assert_allclose(values[i], mean(slow), rtol=1e-12)
        slow = slow_anytime(many[i], lambda t, p, task: task <= t + 1)
        np.testing.assert_allclose(metrics.anytime_accuracy(many, early[:, None])[i], slow, rtol=1e-12)


def test_anytime_accuracy_of_no_curve_is_refused():
    with pytest.raises(ValueError, match=r"must be \[..., T, points, T\], but its shape is \(3, 2\)"):
        metrics.anytime_accuracy(np.zeros((3, 2)))
    with pytest.raises(ValueError, match="at some point of the curve no task was seen"):
        metrics.anytime_accuracy(CURVE, np.arange(3) >= np.arange(1, 4)[:, None, None])


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("n_tasks", range(1, 6))
@pytest.mark.parametrize("name", ["min_accuracy", "stability_gap"])
def test_curve_numbers_equal_loops(name, n_tasks, points):
    slow = {"min_accuracy": slow_min_accuracy, "stability_gap": slow_stability_gap}[name]
    curve, matrix = curves(n_tasks, points, 3, 2), matrices(n_tasks, 3, 2)
    values = getattr(metrics, name)(curve, matrix)
    assert values.shape == (3, 2)
    for i in np.ndindex(3, 2):
        np.testing.assert_allclose(values[i], slow(curve[i], matrix[i]), rtol=1e-12)
        assert np.isnan(values[i]) == (n_tasks == 1)


@pytest.mark.parametrize("shape", [(3, 3), (4, 2), (3,), (2, 3), ()])
@pytest.mark.parametrize("name", NAMES)
def test_wrong_shapes_are_refused(name, shape):
    with pytest.raises(ValueError) as error:
        getattr(metrics, name)(np.zeros(shape))
    assert "[..., T + 1, T]" in str(error.value) and str(shape) in str(error.value)


@pytest.mark.parametrize("name", ["min_accuracy", "stability_gap"])
@pytest.mark.parametrize("shape", [(2, 4, 3), (3, 4, 2), (4, 5, 4), (3, 3)])
def test_a_curve_of_other_tasks_is_refused(name, shape):
    with pytest.raises(ValueError, match="curve"):
        getattr(metrics, name)(np.zeros(shape), np.zeros((4, 3)))


def test_statistics():
    found = metrics.statistics([1.0, 2.0, 4.0, 5.0])
    assert found.mean == 3.0 and found.n == 4
    assert found.sd == pytest.approx(np.sqrt((4 + 1 + 1 + 4) / 3))
    assert found.sem == pytest.approx(np.sqrt(10 / 3) / 2)


def test_statistics_of_one_run():
    found = metrics.statistics(0.5)
    assert found.mean == 0.5 and found.n == 1 and np.isnan(found.sd) and np.isnan(found.sem)


def test_statistics_of_no_runs_are_refused():
    with pytest.raises(ValueError, match="no runs"):
        metrics.statistics([])


# Figures


@pytest.fixture
def axes():
    figure, axes = pyplot.subplots()
    yield axes
    figure.canvas.draw()
    pyplot.close(figure)


@pytest.mark.parametrize("leading", [(), (2,), (3, 2)])
def test_heat_map(axes, leading):
    many = matrices(3, *leading)
    assert plots.accuracy_heat_map(axes, many, "title") is axes
    (image,) = axes.images
    np.testing.assert_allclose(image.get_array(), 100 * many.reshape((-1, 4, 3)).mean(0))
    assert len(axes.texts) == 12 and axes.get_title() == "title"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["before", "1", "2", "3"]


def test_large_heat_map_has_no_text(axes):
    plots.accuracy_heat_map(axes, matrices(11))
    assert len(axes.texts) == 0 and axes.images[0].get_array().shape == (12, 11)


def test_seen_task_accuracy(axes):
    plots.seen_task_accuracy(axes, {"one run": R, "five": matrices(3, 5)})
    assert [line.get_label() for line in axes.lines] == ["one run", "five"]
    assert len(axes.collections) == 1, "a band only where there are several runs"
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [1, 2, 3])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [90, 70, 220 / 3])
    five = matrices(3, 5)
    np.testing.assert_allclose(axes.lines[1].get_ydata()[2], 100 * five[:, 3].mean())
    spread = 100 * five[:, 3].mean(1).std(ddof=1)
    top = axes.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top >= axes.lines[1].get_ydata()[2] + spread - 1e-9


@pytest.mark.parametrize("leading", [(), (4,)])
def test_accuracy_within_tasks(axes, leading):
    curve = np.broadcast_to(np.array(CURVE), (*leading, 3, 2, 3))
    assert plots.accuracy_within_tasks(axes, curve, task=1, every=5) is axes
    line, *boundaries = axes.lines
    np.testing.assert_array_equal(line.get_xdata(), [5, 10, 15, 20, 25, 30])
    np.testing.assert_allclose(line.get_ydata(), [10, 30, 60, 70, 30, 90])
    assert [boundary.get_xdata()[0] for boundary in boundaries] == [10, 20]
    assert len(axes.collections) == len(leading)


def test_anytime_curve(axes):
    plots.anytime_curve(axes, {"one run": CURVE, "four": curves(3, 2, 4)}, every=5)
    assert [line.get_label() for line in axes.lines] == ["one run", "four"] and len(axes.collections) == 1
    np.testing.assert_array_equal(axes.lines[0].get_xdata(), [5, 10, 15, 20, 25, 30])
    np.testing.assert_allclose(axes.lines[0].get_ydata(), [50, 90, 50, 60, 155 / 3, 80])


def test_strength_curve(axes):
    plots.strength_curve(axes, [1.0, 10.0, 100.0], [[0.1, 0.3], [0.4, 0.4], [0.2, 0.4]], label="ewc")
    (line,) = axes.lines
    np.testing.assert_allclose(line.get_ydata(), [20, 40, 30])
    assert axes.get_xscale() == "log" and line.get_label() == "ewc" and len(axes.collections) == 1


def test_confidence_interval_holds_the_mean_as_often_as_it_says() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, (5, 20000))
    low, high = metrics.confidence_interval(values, 0.9)
    assert 0.89 < ((low < 3) & (high > 3)).mean() < 0.91
    np.testing.assert_allclose((low + high) / 2, values.mean(axis=0))
    low, high = metrics.confidence_interval(values.T, axis=1)
    assert low.shape == (20000,)
    assert np.isnan(metrics.confidence_interval([0.5])).all()
    with pytest.raises(ValueError, match="level is 95"):
        metrics.confidence_interval([0.5, 0.6], 95)


def test_class_accuracy_by_hand() -> None:
    np.testing.assert_array_equal(metrics.class_accuracy([[3, 1, 0], [0, 2, 0], [0, 0, 0]]), [0.75, 1.0, np.nan])


def test_names_stand_beside_the_lines_apart_from_each_other() -> None:
    figure, axes = pyplot.subplots(figsize=(4, 3))
    matrices = {f"method {i}": np.full((2, 4, 3), 0.9 + 0.001 * i) for i in range(7)}
    plots.label_lines(plots.seen_task_accuracy(axes, matrices))
    figure.canvas.draw()
    boxes = [matplotlib.text.Text.get_window_extent(text) for text in axes.texts]
    assert len(boxes) == 7 and {text.get_text() for text in axes.texts} == set(matrices)
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[i + 1 :])
    assert min(box.x0 for box in boxes) > axes.get_window_extent().x1
    assert len({line.get_color() for line in axes.lines}) == 7 and len({line.get_marker() for line in axes.lines}) == 7
    heights = dict(zip((text.get_text() for text in axes.texts), (box.y0 for box in boxes), strict=True))
    assert sorted(heights, key=heights.__getitem__) == sorted(matrices)  # in the order of the lines' ends
    pyplot.close(figure)

"""Skills shown by demonstrations, and the small language in which they are permutations."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from cl_zoo import accuracy, compose, supervised
from cl_zoo.language import answer_logits, answering, decoder, generate
from cl_zoo.layers import softmax_attention
from cl_zoo.losses import all_tokens_right, next_token_loss
from cl_zoo.streams import Example, SymbolWorld, skills

WORLD = SymbolWorld(symbols=7, known=2, new=3, length=2, pairs=4)
NET = decoder(WORLD.vocabulary, [(softmax_attention(8, 2), 12, 2)])


def test_padding_before_a_prompt_changes_no_logit() -> None:
    params, _ = NET.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    prompt, answer = jnp.arange(1, 5)[None], jnp.array([[6, 7, 8]])
    wanted = NET.model.apply(params, {}, jnp.concatenate([prompt, answer], 1))[0][:, 3:6]
    np.testing.assert_allclose(answer_logits(NET, params, prompt, None, answer), wanted, atol=1e-6)
    padded = jnp.pad(prompt, ((0, 0), (3, 0)), constant_values=9)
    found = answer_logits(NET, params, padded, jnp.array([3]), answer)
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_rows_are_the_examples() -> None:
    examples = [Example([1], [2, 1], [3]), Example([1, 2, 3], [4, 1, 2, 3], [5, 3])]
    stream = skills([{"train": examples, "test": examples[:1]}, {"train": examples[1:], "test": examples}],
                    vocabulary=6, steps=2, batch_size=1)  # fmt: skip
    test = stream.evaluation(jnp.int32(1), "test")
    x, y = jax.tree.map(lambda leaf: np.asarray(leaf).reshape((-1, *leaf.shape[2:])), (test.x, test.y))
    for i, example in enumerate(examples):
        np.testing.assert_array_equal(x.prompt[i, x.padding[i] :], example.prompt)
        np.testing.assert_array_equal(x.shown[i, x.shown_padding[i] :], example.shown)
        np.testing.assert_array_equal(y[i, : len(example.answer)], example.answer)
        np.testing.assert_array_equal(y[i, len(example.answer) :], -1)
        np.testing.assert_array_equal(x.answer[i], np.maximum(y[i], 0))
    batch, _ = stream.next(stream.init(jax.random.key(0))._replace(step=jnp.int32(2)))
    assert batch.y.tolist() == [[5, 3]] and stream.n_tasks == 2


def test_the_score_is_whether_greedy_decoding_gives_the_answer() -> None:
    params, _ = NET.model.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    params = jax.tree.map(lambda leaf: 3 * leaf, params)
    x = WORLD.examples(0, 60, "train")
    prompt = jnp.array([each.prompt for each in x])
    said = generate(NET, params, prompt, jax.random.key(0), length=WORLD.answer_length, temperature=0)
    answers = [Example(each.prompt, each.shown, tokens.tolist()) for each, tokens in zip(x, np.asarray(said.tokens))]
    wrong = [each._replace(answer=[*each.answer[:-1], (each.answer[-1] + 1) % 9]) for each in answers[:20]]
    stream = skills([{"train": answers, "test": answers[:40] + wrong}], vocabulary=WORLD.vocabulary, steps=1,
                    batch_size=2)  # fmt: skip
    learner = compose(answering(NET), optax.sgd(0.0), supervised(next_token_loss)).bind(params)
    first, _ = stream.next(stream.init(jax.random.key(0)))
    state = learner.init(jax.random.key(0), first)
    np.testing.assert_allclose(accuracy()(learner, state, stream), [2 / 3], atol=1e-6)


def test_all_tokens_right() -> None:
    outputs = jax.nn.one_hot(jnp.array([[1, 2, 0], [1, 0, 0]]), 3)
    assert all_tokens_right(outputs, jnp.array([[1, 2, -1], [1, 2, -1]])).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tasks": []}, "must be a sequence"),
        ({"tasks": {"train": [Example([1], [1], [1])]}}, "must be a sequence"),
        ({"tasks": [[Example([1], [1], [1])]]}, "must be a sequence"),
        ({"tasks": [{"train": [Example([1], [1], [1])]}]}, "task 0 has no test examples; it has train"),
        (
            {"tasks": [{"train": [], "validate": []}]},
            "task 0 has the split 'validate', but there are",
        ),
        ({"prompt_length": 0}, "prompt_length is 0"),
        ({"answer_length": -2}, "answer_length is -2"),
        (
            {"tasks": [{"train": [Example("a", [1], [1])], "test": [Example([1], [1], [1])]}]},
            "prompt is 'a'",
        ),  # type: ignore[arg-type]
        ({"tasks": [{"train": [([1], [1], [1])], "test": [Example([1], [1], [1])]}]}, "an example's prompt is None"),
        ({"tasks": [{"train": [Example([1], [1.5], [1])], "test": [Example([1], [1], [1])]}]}, "must be whole numbers"),  # type: ignore[list-item]
        ({"vocabulary": 5}, "token 5"),
        ({"prompt_length": 1}, "a prompt has 2 tokens, but prompt_length is 1"),
        ({"answer_length": 1}, "an answer has 2 tokens"),
        ({"tasks": [{"train": [Example([-1], [1], [1])] * 2, "test": [Example([1], [1], [1])]}]}, "the token -1"),
        (
            {"tasks": [{"train": [Example([], [1], [1])] * 2, "test": [Example([1], [1], [1])]}]},
            "prompt is empty",
        ),
    ],
)
def test_what_is_refused(changed: dict[str, object], words: str) -> None:
    one = Example([1, 2], [3, 1, 2], [4, 5])
    settings = {"tasks": [{"train": [one] * 2, "test": [one]}], "vocabulary": 6, "steps": 1, "batch_size": 1}
    with pytest.raises(ValueError, match=words):
        skills(**(settings | changed))


def decode(world: SymbolWorld, tokens: list[int]) -> tuple[int, list[int]]:
    """Cue and symbols of a question."""
    first = 4 + world.known + world.new
    assert tokens[-1] == 2
    return tokens[0] - 4, [token - first for token in tokens[1:-1]]


def test_what_a_demonstration_shows_is_the_answer() -> None:
    first = 4 + WORLD.known + WORLD.new
    for cue in range(WORLD.known + WORLD.new):
        for one in WORLD.examples(cue, 20, "train", 1):
            told, asked = decode(WORLD, list(one.prompt))
            assert told == cue and list(one.shown[-len(one.prompt) :]) == list(one.prompt) and one.shown[0] == 1
            pairs = np.array(one.shown[1 : -len(one.prompt)]).reshape((-1, 2)) - first
            assert len(set(pairs[:, 0])) == WORLD.pairs
            shown = dict(pairs.tolist())
            assert one.answer == [*(first + shown[symbol] for symbol in asked), 3]
            assert [shown[symbol] for symbol in asked] == WORLD.permutations[cue][asked].tolist()
    fresh = WORLD.fresh(10, 0)
    assert all(one.prompt == one.shown for one in fresh)


def test_the_language_tells_known_cues_and_demonstrations() -> None:
    stream = WORLD.language(steps=3, batch_size=200)
    batch, _ = stream.next(stream.init(jax.random.key(0)))
    first, seen = 4 + WORLD.known + WORLD.new, {"shown": 0, "known": 0, "new": 0}
    for x, y in zip(np.asarray(batch.x), np.asarray(batch.y)):
        answer = y[y >= 0].tolist()
        place = int(np.flatnonzero(y >= 0)[0])
        assert answer[-1] == 3 and len(answer) == WORLD.answer_length
        np.testing.assert_array_equal(x[place + 1 : place + len(answer)], answer[:-1])
        cue, asked = decode(WORLD, x[place - WORLD.length - 1 : place + 1].tolist())
        if x[0] == 1:
            pairs = dict((x[1 : 1 + 2 * WORLD.pairs].reshape((-1, 2)) - first).tolist())
            wanted, kind = [pairs[symbol] for symbol in asked], "shown"
        elif cue < WORLD.known:
            wanted, kind = WORLD.permutations[cue][asked].tolist(), "known"
        else:
            wanted, kind = asked, "new"
        assert [token - first for token in answer[:-1]] == wanted
        seen[kind] += 1
    assert seen["shown"] > 60 and seen["known"] > 40 and seen["new"] > 5


def test_skills_and_what_may_be_forgotten() -> None:
    stream, held = WORLD.skills(steps=2, batch_size=4, examples=20, tests=10), WORLD.known_skills(tests=10)
    assert stream.n_tasks == 3 and held.n_tasks == WORLD.known + 1
    batch, _ = stream.next(stream.init(jax.random.key(0)))
    assert batch.x.padding is None and batch.x.shown_padding is None
    assert (batch.x.prompt[:, 0] == 4 + WORLD.known).all()
    train, test = (
        {tuple(row) for row in np.asarray(stream.sample(jnp.int32(0), jax.random.key(0)).x.prompt)[0]},
        {tuple(row) for row in np.asarray(stream.evaluation(jnp.int32(0), "test").x.prompt)[0]},
    )
    assert len(train) == 20 and len(test) == 8 and not train & test  # of 42 questions, a fifth


@pytest.mark.parametrize("wrong", [{"pairs": 1}, {"pairs": 8}, {"length": 8}, {"known": 0}])
def test_worlds_that_cannot_be(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong)) if "length" not in wrong else "symbols"):
        WORLD._replace(**wrong).fresh(1, 0)

"""How steps are cut for stages: nothing is lost, doubled or reordered, and only the last part yields tokens."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pdctl.engine.executor.microbatches import microbatches
from pdctl.engine.ipc.messages import Sampling
from pdctl.engine.schedule.batch import Slice
from pdctl.engine.schedule.sequence import Sequence


def piece(number: int, start: int, count: int, samples: bool, drafts: int) -> Slice:
    length = start + count + (0 if samples else 7)
    sequence = Sequence(f"r{number}", list(range(length)), length, Sampling(max_tokens=9))
    return Slice(sequence, start, count, samples, tuple(range(drafts)) if samples else ())


@st.composite
def steps(draw: st.DrawFn) -> list[Slice]:
    """Decoding sequences, with guesses or without, and prompts or parts of them, in any order."""
    found = []
    for number in range(draw(st.integers(1, 8))):
        start = draw(st.integers(0, 40))
        if draw(st.booleans()):
            found.append(piece(number, start, 1, True, draw(st.integers(0, 4))))
        else:
            found.append(piece(number, start, draw(st.integers(1, 700)), draw(st.booleans()), 0))
    return found


def rows(batch: list[Slice]) -> list[tuple[str, int]]:
    """What is computed: of which sequence, and the position of its token."""
    return [
        (one.sequence.request_id, position)
        for one in batch
        for position in range(one.start, one.start + one.num_rows)
    ]


@given(steps(), st.integers(1, 4))
def test_a_cut_step_computes_the_same_rows_and_yields_the_same_tokens(batch: list[Slice], stages: int) -> None:
    parts = microbatches(batch, stages)
    assert all(parts), "an empty part would wait for nothing"
    assert sorted(row for part in parts for row in rows(part)) == sorted(rows(batch))
    for sequence in {one.sequence.request_id for one in batch}:
        positions = [position for part in parts for name, position in rows(part) if name == sequence]
        assert positions == sorted(positions), "attention of a row reads the rows before it"
    assert not any(one.num_sampled for part in parts[:-1] for one in part)
    assert [(one.sequence, one.drafts) for one in parts[-1] if one.num_sampled] == [
        (one.sequence, one.drafts) for one in batch if one.num_sampled
    ]


@given(st.integers(1, 4000), st.integers(1, 4), st.booleans())
def test_parts_of_a_long_prompt_are_as_long_as_each_other(count: int, stages: int, samples: bool) -> None:
    sizes = [len(rows(part)) for part in microbatches([piece(0, 0, count, samples, 0)], stages)]
    assert len(sizes) == (1 if stages == 1 else max(1, min(count // 128, 2 * stages)))
    assert max(sizes) - min(sizes) < len(sizes)


def test_what_decodes_is_not_cut() -> None:
    batch = [piece(number, number, 1, True, 3) for number in range(100)]
    assert microbatches(batch, 2) == [batch]


def test_log_probabilities_of_a_prompt_need_the_whole_step() -> None:
    asked = piece(0, 0, 500, True, 0)
    asked.sequence.sampling = Sampling(max_tokens=1, prompt_logprobs=0)
    assert microbatches([asked, piece(1, 0, 500, True, 0)], 2) == [[asked, piece(1, 0, 500, True, 0)]]

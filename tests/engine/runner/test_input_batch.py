import pytest
import torch

from engine.attention.spans import SpanPlan
from engine.runner import input_batch
from engine.runner.input_batch import InputBatch
from engine.runner.layout import Layout, most_tiles
from engine.runner.staging import Staging
from engine.step import StepPlan
from tests.engine.gpu import needs_gpu

BLOCK_SIZE, MAX_SEQS, MAX_BLOCKS = 4, 6, 5
CPU = torch.device("cpu")
SPANS = SpanPlan(1)
BLOCKS = {2: [9, 3], 0: [7, 1, 8], 5: [2, 4, 6, 5]}
"""Row → its blocks."""


@pytest.fixture(params=["whole tables", "columns in use"])
def batch(request, monkeypatch):
    if request.param == "columns in use":
        monkeypatch.setattr(input_batch, "WHOLE_TABLE_BYTES", 0)
    return InputBatch(MAX_SEQS, MAX_BLOCKS, BLOCK_SIZE, 64, CPU, SPANS)


def new_blocks():
    return {row: (0, blocks) for row, blocks in BLOCKS.items()}


def decode_plan(**options):
    return StepPlan(1, [5, 2, 0], [13, 6, 11], [1, 1, 1], [True] * 3, new_blocks=new_blocks())


def mixed_plan():
    """A decode whose token the device has, one that the host knows, a last and a first chunk."""
    return StepPlan(
        1,
        [2, 5, 0, 1],
        [6, 13, 2, 0],
        [1, 1, 9, 5],
        [True, True, True, False],
        {5: [33], 0: [*range(40, 49)], 1: [*range(50, 55)]},
        new_blocks=new_blocks() | {1: (0, [10, 11])},
    )


def tokens_of(plan):
    """(row, position) of each token that a plan computes."""
    counts = zip(plan.rows, plan.starts, plan.num_tokens, strict=True)
    return [(row, start + i) for row, start, count in counts for i in range(count)]


def slot(row, position, blocks):
    return blocks[row][position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE


@pytest.mark.parametrize("make", [decode_plan, mixed_plan])
def test_tokens_lie_where_the_plan_says(batch, make):
    plan, blocks = make(), BLOCKS | {1: [10, 11]}
    inputs, tokens = batch.build(plan), tokens_of(plan)
    attention = inputs.attention
    assert inputs.positions.tolist() == [position for _, position in tokens]
    assert attention.slot_mapping.tolist() == [slot(*token, blocks) for token in tokens]
    lens = [start + count for start, count in zip(plan.starts, plan.num_tokens, strict=True)]
    assert attention.seq_lens == lens
    assert attention.decode_lens.tolist() == lens[: attention.num_decodes]
    assert attention.query_lens == plan.num_tokens
    assert attention.block_size == BLOCK_SIZE
    for row, table, length in zip(plan.rows, attention.block_table.tolist(), lens, strict=True):
        needed = -(-length // BLOCK_SIZE)
        assert table[:needed] == blocks[row][:needed]


def test_mixed_steps_know_their_decodes_and_samples(batch):
    inputs = batch.build(mixed_plan())
    attention = inputs.attention
    assert attention.num_decodes == 2
    assert attention.query_starts.tolist() == [0, 9, 14]
    assert attention.key_starts.tolist() == [0, 11, 16]
    assert attention.spans.tolist() == [[1, 0, 1, 14], [0, 0, 1, 7]]
    assert inputs.samples.rows == inputs.samples.row_index.tolist() == [2, 5, 0]
    assert inputs.samples.positions == inputs.samples.position_index.tolist() == [7, 14, 11]
    assert inputs.sample_indices.tolist() == [0, 1, 10]
    assert attention.tiles.tolist() == [[2, 2, 9, 2], [3, 11, 5, 0]]


def test_tokens_come_from_the_host_or_from_the_last_sample(batch):
    sampled = batch.build(decode_plan())
    batch.store_sampled(sampled, torch.tensor([71, 72, 73]))
    tokens = batch.input_tokens(batch.build(mixed_plan())).tolist()
    assert tokens == [72, 33, *range(40, 49), *range(50, 55)]
    assert batch.input_tokens(batch.build(decode_plan())).tolist() == [71, 72, 73]


def test_samples_of_a_step_are_the_inputs_of_the_next_whatever_the_order(batch):
    batch.store_sampled(batch.build(mixed_plan()), torch.tensor([1, 2, 3]))
    assert batch.input_tokens(batch.build(decode_plan())).tolist() == [2, 1, 3]


def test_blocks_stay_and_grow(batch):
    batch.build(decode_plan())
    batch.build(StepPlan(2, [2], [8], [1], [True], new_blocks={2: (2, [12])}))
    inputs = batch.build(StepPlan(3, [2], [9], [1], [True]))
    assert inputs.attention.block_table.tolist() == [[9, 3, 12]]
    assert inputs.attention.slot_mapping.tolist() == [12 * BLOCK_SIZE + 1]


def fields(inputs):
    """Tensors of a step by name, and of the block table what its sequences use."""
    attention = inputs.attention
    names = ("slot_mapping", "decode_lens", "query_starts", "key_starts")
    found = {name: getattr(attention, name).tolist() for name in names}
    found["spans"] = [span for span in attention.spans.tolist() if span[3]]
    found |= {name: getattr(inputs, name).tolist() for name in ("known_tokens", "token_sources")}
    found["positions"] = inputs.positions.tolist()
    found["sample_indices"] = inputs.sample_indices[: len(inputs.samples.rows)].tolist()
    found["rows"] = inputs.samples.row_index.tolist()
    found["sampled at"] = inputs.samples.position_index.tolist()
    found["lists"] = [inputs.samples.rows, inputs.samples.positions, attention.query_lens]
    found["lens"] = [attention.num_decodes, attention.seq_lens]
    tables = zip(attention.block_table.tolist(), attention.seq_lens, strict=True)
    found["tables"] = [table[: -(-length // BLOCK_SIZE)] for table, length in tables]
    return found


def test_a_decode_step_is_the_same_for_a_graph(batch):
    whole, for_graph = batch.build(decode_plan()), batch.build_decode(decode_plan(), 3)
    assert fields(for_graph) == fields(whole)
    assert for_graph.attention.block_table.shape == (3, MAX_BLOCKS)


@pytest.mark.parametrize("known", [{}, {2: [44]}])
def test_padding_reads_and_writes_the_null_block_alone(batch, known):
    batch.last_tokens[:] = 99
    plan = decode_plan()
    plan.input_ids = known
    padded, alone = batch.build_decode(plan, 6), batch.build(plan)
    assert batch.input_tokens(padded).tolist() == [*batch.input_tokens(alone).tolist(), 0, 0, 0]
    assert padded.attention.slot_mapping[3:].tolist() == [0, 0, 0]
    assert padded.attention.seq_lens[3:] == [1, 1, 1]
    assert padded.attention.decode_lens[3:].tolist() == [1, 1, 1]
    assert not padded.attention.block_table[3:, :1].any()
    assert padded.positions[3:].tolist() == [0, 0, 0]
    assert sorted(padded.attention.spans[:6, 0].tolist()) == [*range(6)]
    assert padded.attention.num_decodes == 6
    for name in ("rows", "sampled at", "sample_indices"):  # padding samples nothing
        assert fields(padded)[name] == fields(alone)[name]


def test_tensors_of_a_graph_depend_on_its_size_alone(batch):
    """The samples and a table of which only columns in use are uploaded aside."""
    full, empty = batch.build_decode(decode_plan(), 4), batch.build_decode(StepPlan(2), 4)
    for name in ("known_tokens", "token_sources", "positions"):
        assert getattr(full, name).shape == getattr(empty, name).shape
    for name in ("slot_mapping", "block_table", "decode_lens", "query_starts", "spans"):
        assert getattr(full.attention, name).shape == getattr(empty.attention, name).shape


def uploaded_columns(batch, monkeypatch, plan, size):
    """Columns of the block table that a graph's step brings to the device."""
    found, upload = [], batch._staging.upload
    monkeypatch.setattr(
        batch._staging, "upload", lambda arrays: found.append(arrays[-3].shape) or upload(arrays)
    )
    batch.build_decode(plan, size)
    assert [rows for rows, _ in found] == [size]
    return found[0][1]


@pytest.mark.parametrize(("most", "columns"), [(4 * MAX_BLOCKS * 4, MAX_BLOCKS), (0, 4)])
def test_of_large_tables_only_the_columns_in_use_are_uploaded(most, columns, monkeypatch):
    monkeypatch.setattr(input_batch, "WHOLE_TABLE_BYTES", most)
    batch = InputBatch(MAX_SEQS, MAX_BLOCKS, BLOCK_SIZE, 64, CPU, SPANS)
    assert uploaded_columns(batch, monkeypatch, decode_plan(), 4) == columns


def test_columns_that_were_in_use_do_not_disturb_shorter_rows(batch):
    batch.build_decode(decode_plan(), 4)
    short = StepPlan(2, [2, 0], [7, 11], [1, 1], [True, True])
    inputs = batch.build_decode(short, 4)
    table = inputs.attention.block_table.tolist()
    assert [table[0][:2], table[1][:3], table[2][:1], table[3][:1]] == [[9, 3], [7, 1, 8], [0], [0]]
    assert inputs.sample_indices[:2].tolist() == [0, 1]


def long_plan():
    """A decode, a chunk of more than two tiles over a prefix, and one of a tile and a token."""
    blocks = {3: (0, [5]), 0: (0, [*range(20, 70)]), 1: (0, [*range(70, 90)])}
    rows, starts, counts = [3, 0, 1], [2, 30, 0], [1, 140, 65]
    known = {0: [*range(140)], 1: [*range(65)]}
    return StepPlan(1, rows, starts, counts, [True, True, False], known, new_blocks=blocks)


@pytest.mark.parametrize("make", [decode_plan, mixed_plan, long_plan])
def test_a_padded_step_is_the_same_but_for_what_it_skips(make):
    batch = InputBatch(MAX_SEQS, 64, BLOCK_SIZE, 256, CPU, SPANS)
    batch.last_tokens[:] = 99
    alone, padded = batch.build(make()), batch.build_padded(make(), 256)
    tokens, count = len(alone.positions), len(alone.samples.rows)
    assert batch.input_tokens(padded)[:tokens].tolist() == batch.input_tokens(alone).tolist()
    assert not batch.input_tokens(padded)[tokens:].any()
    for name in ("positions", "sample_indices"):
        kept = tokens if name == "positions" else count
        assert getattr(padded, name)[:kept].tolist() == getattr(alone, name).tolist()
    assert padded.samples.row_index.tolist() == alone.samples.row_index.tolist()
    assert padded.samples.position_index.tolist() == alone.samples.position_index.tolist()
    wanted, found = alone.attention, padded.attention
    assert found.padded
    assert found.slot_mapping.tolist() == [*wanted.slot_mapping.tolist(), *[0] * (256 - tokens)]
    decodes = wanted.num_decodes
    assert found.decode_lens[:decodes].tolist() == wanted.decode_lens.tolist()
    assert not found.decode_lens[decodes:].any()
    assert found.spans[:decodes].tolist() == wanted.spans.tolist()
    assert not found.spans[decodes:, 3].any()
    assert found.num_tiles.tolist() == wanted.num_tiles.tolist() == [len(wanted.tiles)]
    assert found.tiles[: len(wanted.tiles)].tolist() == wanted.tiles.tolist()
    assert not found.tiles[len(wanted.tiles) :, 2].any()
    width = wanted.block_table.shape[1]
    assert found.block_table[: len(wanted.seq_lens), :width].equal(wanted.block_table)


@pytest.mark.parametrize("most", [0, 1 << 18])
def test_padded_shapes_depend_on_the_size_alone(most, monkeypatch):
    monkeypatch.setattr(input_batch, "WHOLE_TABLE_BYTES", most)
    batch = InputBatch(MAX_SEQS, 64, BLOCK_SIZE, 256, CPU, SPANS)
    shapes = set()
    for plan in (StepPlan(0), decode_plan(), mixed_plan(), long_plan()):
        inputs = batch.build_padded(plan, 256)
        names = ("slot_mapping", "block_table", "decode_lens", "spans", "tiles", "num_tiles")
        found = [getattr(inputs.attention, name).shape for name in names]
        names = ("known_tokens", "token_sources", "positions", "sample_indices")
        shapes.add((*found, *(getattr(inputs, name).shape for name in names)))
    assert len(shapes) == 1


def test_tiles_of_any_rows_fit():
    for counts in ([2] * 32, [64], [63, 1], [33, 31], [65, 63, 2, 126]):
        layout = Layout.of(StepPlan(0, [0] * len(counts), [0] * len(counts), counts), 40, 256)
        assert sum(layout.tiles()[:, 2]) == sum(n for n in counts if n > 1)
        assert len(layout.tiles()) <= most_tiles(sum(counts), len(counts))


class MeasuredStaging(Staging):
    """Fails where the GPU's would have no room."""

    def __init__(self, capacity, device):
        super().__init__(capacity, device)
        self.capacity = capacity

    def upload(self, arrays):
        assert sum(-(-array.nbytes // 16) * 16 for array in arrays) <= self.capacity
        return super().upload(arrays)


@pytest.mark.parametrize("rows", [1, 255, 512])
@pytest.mark.parametrize("tokens", [512, 1024])
def test_the_largest_steps_have_room(rows, tokens, monkeypatch):
    monkeypatch.setattr(input_batch, "MAX_PADDED_ROWS", 512)
    monkeypatch.setattr(input_batch, "Staging", MeasuredStaging)
    batch = InputBatch(rows, 8, 256, tokens, CPU, SpanPlan(132))
    every = [*range(rows)]
    batch.build_decode(StepPlan(1, every, [0] * rows, [1] * rows, [True] * rows), rows)
    for count in {1, tokens // rows}:
        plan = StepPlan(1, every, [0] * rows, [count] * rows, [True] * rows)
        batch.build(plan)
        batch.build_padded(plan, tokens)


class TestOnGPU:
    pytestmark = needs_gpu

    @pytest.mark.parametrize("most", [0, 1 << 18])
    def test_what_a_graph_reads_keeps_its_address(self, most, monkeypatch):
        monkeypatch.setattr(input_batch, "WHOLE_TABLE_BYTES", most)
        batch = InputBatch(MAX_SEQS, MAX_BLOCKS, BLOCK_SIZE, 64, torch.device("cuda"), SPANS)
        short = StepPlan(2, [2, 0], [7, 11], [1, 1], [True, True])
        places = []
        for plan in (StepPlan(0), decode_plan(), short):
            inputs = batch.build_decode(plan, 4)
            attention = inputs.attention
            tensors = [inputs.known_tokens, inputs.token_sources, inputs.positions]
            tensors += [attention.slot_mapping, attention.block_table, attention.decode_lens]
            tensors += [attention.spans, attention.num_tiles]
            places.append([(t.data_ptr(), t.shape, t.stride()) for t in tensors])
        assert places[0] == places[1] == places[2]
        assert attention.block_table[:2, :2].tolist() == [[9, 3], [7, 1]]

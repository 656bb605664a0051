"""The reader of scheduled HLO, on a module of a few lines."""

import pytest

from sidp_jax.timeline import read_timeline

# ruff: noqa: E501

MODULE = """\
HloModule jit_step, is_scheduled=true, num_partitions=4, num_partitions=4

%inner_gemm (p0: bf16[8,16]) -> bf16[8,16] {
  %p0 = bf16[8,16]{1,0} parameter(0)
  ROOT %call = (bf16[8,16]{1,0}, s8[4096]{0}) custom-call(%p0), custom_call_target="__cublas$lt$matmul"
}

%moved (p1: bf16[2,16,16]) -> bf16[16,16] {
  %p1 = bf16[2,16,16]{2,1,0} parameter(0)
  %slice.1 = bf16[1,16,16]{2,1,0} slice(%p1), slice={[0:1], [0:16], [0:16]}
  ROOT %bitcast.1 = bf16[16,16]{1,0} bitcast(%slice.1)
}

%added (p2: bf16[16,16]) -> bf16[16,16] {
  %p2 = bf16[16,16]{1,0} parameter(0)
  ROOT %add.1 = bf16[16,16]{1,0} add(%p2, %p2)
}

%body (state: (s32[], bf16[4])) -> (s32[], bf16[4]) {
  %state = (s32[], bf16[4]{0}) parameter(0)
  %part = bf16[4]{0} get-tuple-element(%state), index=1
  ROOT %sum = bf16[4]{0} all-reduce(%part), replica_groups=[1,4]<=[4], to_apply=%add
}

ENTRY %main (x: bf16[8,16]) -> bf16[8,16] {
  %x = bf16[8,16]{1,0} parameter(0)
  %get.1 = ((bf16[16,16]{1,0}), bf16[16,16]{1,0}) collective-broadcast-start(%w0), replica_groups={{0,1,2,3}}
  %get.2 = bf16[16,16]{1,0} collective-broadcast-done(%get.1)
  %g0 = (bf16[8,16]{1,0}, s8[4096]{0}) custom-call(%x, %get.2), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/pre_attention/dot_general"}
  %get.3 = ((bf16[16,16]{1,0}), bf16[16,16]{1,0}) collective-broadcast-start(%w1), replica_groups={{1,0,2,3}}
  %g1 = bf16[8,16]{1,0} fusion(%x), kind=kCustom, calls=%inner_gemm, metadata={op_name="jit(step)/post_attention/dot_general"}
  %get.4 = bf16[16,16]{1,0} collective-broadcast-done(%get.3)
  %get.5 = ((bf16[16,16]{1,0}), bf16[16,16]{1,0}) collective-broadcast-start(%w2), replica_groups={{2,0,1,3}}
  %get.6 = bf16[16,16]{1,0} collective-broadcast-done(%get.5)
  %g2 = (bf16[8,16]{1,0}, s8[4096]{0}) custom-call(%g1, %get.4), custom_call_target="__cublas$lt$matmul", metadata={op_name="jit(step)/pre_attention/dot_general"}
  %row = bf16[16,16]{1,0} fusion(%slab), kind=kLoop, calls=%moved
  %twice = bf16[16,16]{1,0} fusion(%row), kind=kLoop, calls=%added
  %while.1 = (s32[], bf16[4]{0}) while(%init), condition=%less, body=%body, backend_config={"known_trip_count":{"n":"3"}}
  %all = bf16[32,16]{1,0} all-gather(%x), replica_groups=mesh['pool'=4,'tensor'=2] {'pool'}, dimensions={0}
  %mine.1 = ((bf16[32,16]{1,0}), bf16[8,16]{1,0}) reduce-scatter-start(%all), replica_groups={{0,1,2,3}}
  %mine.2 = bf16[8,16]{1,0} reduce-scatter-done(%mine.1)
  ROOT %next = bf16[8,16]{1,0} collective-permute(%mine.2), source_target_pairs={{0,1},{1,0},{2,2}}
}
"""


@pytest.fixture(scope="module")
def timeline():
    return read_timeline(MODULE)


def test_events_in_the_order_of_the_schedule(timeline):
    assert [event.kind for event in timeline.events] == [
        *("start", "done", "gemm", "start", "gemm", "done", "start", "done", "gemm"),
        *("copy", "loop", "collective", "end"),
        *("collective", "start", "done", "collective"),
    ]


def test_a_gemm_is_seen_inside_a_fusion_and_without_its_workspace(timeline):
    assert [gemm.shape for gemm in timeline.of("gemm")] == ["bf16[8,16]"] * 3


def test_only_fusions_that_move_data_are_copies(timeline):
    assert [copy.name for copy in timeline.copies(512)] == ["row"]
    assert timeline.copies(513) == []


def test_fetches_know_the_gemms_above_them(timeline):
    covered = [(fetch.layer, fetch.beneath) for fetch in timeline.fetches]
    assert covered == [(0, ()), (1, ((0, "bf16[8,16]"),)), (2, ())]


def test_an_uncovered_fetch_is_exposed(timeline):
    assert [fetch.start.name for fetch in timeline.exposed()] == ["get.5"]


def test_received_bytes_of_every_collective(timeline):
    received = {
        event.collective: event.received * event.times
        for event in timeline.of("start", "collective")
    }
    assert received == {
        "broadcast": 512 * 3 / 4,
        "all-reduce": 3 * 2 * 8 * 3 / 4,
        "all-gather": 1024 * 3 / 4,
        "reduce-scatter": 256 * 3,
        "permute": 256 * 2 / 4,  # two of four devices get something from another one
    }
    assert timeline.received_bytes() == sum(received.values()) + 2 * received["broadcast"]


def test_it_prints_layer_by_layer(timeline):
    lines = str(timeline).splitlines()
    assert lines[0] == "before the first layer"
    assert lines.index("layer 1") - lines.index("layer 0") == 1 + 6
    assert any("x3" in line and "all-reduce" in line for line in lines)


def test_an_unscheduled_module_is_refused():
    with pytest.raises(ValueError, match=r"as_text\(\)"):
        read_timeline(MODULE.replace(", is_scheduled=true", ""))

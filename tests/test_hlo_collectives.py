"""What a compiled program's text says of its collectives, in every way that XLA writes them."""

import pytest

from launch.compile.hlo_collectives import KINDS, collectives, merged

HLO = """HloModule jit_step, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(f32[] %a, f32[] %b)
}

%fused_1 (p: bf16[128,64]) -> bf16[256,64] {
  ROOT %all-gather.9 = bf16[256,64]{1,0} all-gather(%p), channel_id=7, replica_groups=[4,2]<=[8], \
dimensions={0}, frontend_attributes={chain_id="0"}
}

%fused_2 (p: bf16[128,64]) -> bf16[256,64] {
  ROOT %all-gather.10 = bf16[256,64]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, \
replica_groups=[4,2]<=[8], frontend_attributes={chain_id="0"}
}

%inner (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %all-reduce.1 = f32[8]{0:T(256)} all-reduce(%x), channel_id=1, replica_groups=mesh['a'=2,'b'=4], \
device_ids=([2,4]T(1,0)) {'b'}, to_apply=%add, metadata={op_name="jit(step)/sum" id=1}
}

%outer (t: (s32[], f32[8])) -> (s32[], f32[8]) {
  %w = (s32[], f32[8]{0}) while(%t), condition=%below, body=%inner, \
backend_config={"known_trip_count":{"n":"5"},"x":1}
}

%below (t: (s32[], f32[8])) -> pred[] {
  %all-reduce.2 = pred[]{:T(128)} all-reduce(%p), replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
}

%counted (t: (f32[8], s32[])) -> (f32[8], s32[]) {
  %i = s32[]{:T(128)} get-tuple-element(%t), index=1
  %i.2 = s32[]{:T(128)S(6)} copy(%i)
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%i.2, %one), metadata={op_name="next"}
  %all-reduce.7 = f32[9]{0} all-reduce(%x), replica_groups={{0,1}}, to_apply=%add
  ROOT %both = (f32[8]{0}, /*index=1*/s32[]{:T(128)}) tuple(%x, /*index=1*/%next)
}

%under (t: (f32[8], s32[])) -> pred[] {
  %i.3 = s32[] get-tuple-element(%t), index=1
  %most = s32[] constant(7)
  ROOT %lt = pred[]{:T(512)} compare(%i.3, %most), direction=LT
}

%unreachable (p: f32[8]) -> f32[8] {
  %all-to-all.1 = f32[8] all-to-all(%p), replica_groups={{0,1}}
}

%all-reduce-scatter.2 (p: f32[64,8]) -> f32[8,8] {
  %all-reduce.5 = f32[64,8]{1,0} all-reduce(%p), replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %slice = f32[8,8]{1,0} dynamic-slice(%all-reduce.5, %i), dynamic_slice_sizes={8,8}
}

ENTRY %main (p: bf16[128,64]) -> f32[2] {
  %w.1 = (s32[], f32[8]{0}) while(%t), condition=%never, body=%outer, backend_config={"known_trip_\
count":{"n":"3"}}
  %w.2 = (s32[], /*index=1*/f32[8]{0}) while(%t), condition=%below, body=%inner
  %zero = s32[]{:T(128)} constant(0)
  %begin = s32[]{:T(128)} copy(%zero)
  %both.1 = (f32[8]{0}, s32[]) tuple(%y, %begin)
  %w.3 = (f32[8]{0}, s32[]) while(%both.1), condition=%under, body=%counted
  %both.2 = (f32[8]{0}, s32[]) tuple(%y, %given)
  %w.4 = (f32[8]{0}, s32[]) while(%both.2), condition=%under, body=%counted
  %f.1 = bf16[256,64]{1,0} fusion(%p), kind=kCustom, calls=%fused_1
  %f.2 = bf16[256,64]{1,0} fusion(%p), kind=kCustom, calls=%fused_2
  %f.3 = f32[8,8]{1,0} fusion(%q), kind=kCustom, calls=%all-reduce-scatter.2
  %rs = f32[2]{0} reduce-scatter(%x), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%add
  %s = (f32[4,3]{1,0:T(4,128)}, f32[4,3]{1,0:T(4,128)}, u32[]{:S(2)}, u32[]{:S(2)}) \
collective-permute-start(%y), channel_id=3, source_target_pairs={{1,0},{2,1}}
  %d = f32[4,3]{1,0:T(4,128)} collective-permute-done(%s)
  %g = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%y), replica_groups=[1,8]<=[8]
  %h = bf16[16,8]{1,0} all-gather-done(%g)
  %v = (f32[4]{0}, s8[6]{0}) all-reduce(%y, %z), replica_groups={{0,1},{2,3}}, to_apply=%add
  ROOT %a2a = (f32[2,4]{1,0}, f32[2,4]{1,0}) all-to-all(%y, %z), replica_groups={{0,1},{2,3}}
}
"""


def test_collectives_of_a_text():
    """Loops multiply, phases of one asynchronous collective count once, whole arrays are given."""
    found = {(c.kind, c.shapes, c.bytes, c.group, c.count, c.per_iteration)
             for c in collectives(HLO)}  # fmt: skip
    assert found == {
        ("all-reduce", ("f32[8]",), 32, 4, 3 * 5, False),
        ("all-reduce", ("f32[8]",), 32, 4, 1, True),
        ("all-reduce", ("pred[]",), 1, 8, 3 * 5, False),
        ("all-reduce", ("pred[]",), 1, 8, 1, True),
        ("all-gather", ("bf16[256,64]",), 256 * 64 * 2, 2, 1, False),
        ("reduce-scatter", ("f32[2]x4",), 32, 4, 1, False),
        ("all-reduce", ("f32[9]",), 36, 2, 7, False),
        ("all-reduce", ("f32[9]",), 36, 2, 1, True),  # from a number that is not known
        ("reduce-scatter", ("f32[64,8]",), 64 * 8 * 4, 8, 1, False),
        ("collective-permute", ("f32[4,3]",), 48, 2, 1, False),
        ("all-gather", ("bf16[16,8]",), 256, 8, 1, False),
        ("all-reduce", ("f32[4]", "s8[6]"), 22, 2, 1, False),
        ("all-to-all", ("f32[2,4]", "f32[2,4]"), 64, 2, 1, False),
    }
    (sum_,) = (c for c in collectives(HLO) if c.shapes == ("f32[8]",) and not c.per_iteration)
    assert sum_.source == "jit(step)/sum" and sum_.sent == 15 * 32 * 2 * 3 / 4
    (gathered,) = (c for c in collectives(HLO) if c.group == 2 and c.kind == "all-gather")
    assert gathered.sent == 256 * 64 * 2 / 2
    with pytest.raises(ValueError, match="no ENTRY computation"):
        collectives("HloModule empty")


def test_every_kind_is_read():
    for kind in KINDS:
        text = f"ENTRY %m (p: f32[4]) -> f32[4] {{\n  %x = f32[4]{{0}} {kind}(%p)\n}}\n"
        (found,) = collectives(text)
        assert (found.kind, found.bytes, found.group) == (kind, 16, 0)


def test_those_that_differ_in_their_source_alone_are_one():
    sum_ = "  %x = f32[4]{0} all-reduce(%p), replica_groups={{0,1}}, metadata={op_name="
    lines = "\n".join(f'{sum_}"{n}"}}' for n in "abb")
    found = collectives(f"ENTRY %m (p: f32[4]) -> f32[4] {{\n{lines}\n}}\n")
    assert {(c.source, c.count) for c in found} == {("a", 1), ("b", 2)}
    (one,) = merged(found)
    assert (one.source, one.count, one.sent) == ("", 3, 48)

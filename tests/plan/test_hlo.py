"""Collectives, loops and memory traffic read from a compiler's text.

Every number below can be counted by hand in it.
"""

import pytest

from blip_jax.plan import hlo

PROGRAM = """HloModule jit_step, is_scheduled=true

%fused_slice (param_0.1: f32[3,4,128], param_1.1: s32[]) -> f32[1,4,128] {
  %param_0.1 = f32[3,4,128]{2,1,0:T(8,128)} parameter(0)
  %param_1.1 = s32[]{:T(128)} parameter(1)
  ROOT %dynamic-slice.1 = f32[1,4,128]{2,1,0:T(8,128)} dynamic-slice(%param_0.1, %param_1.1), dynamic_slice_sizes={1,4,128}
}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (loop.1: (s32[], f32[3,4,128])) -> (s32[], f32[3,4,128]) {
  %loop.1 = (s32[]{:T(128)}, f32[3,4,128]{2,1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%loop.1), index=0
  %stack = f32[3,4,128]{2,1,0:T(8,128)} get-tuple-element(%loop.1), index=1
  %layer = f32[1,4,128]{2,1,0:T(8,128)} fusion(%stack, %i), kind=kLoop, calls=%fused_slice
  %all-reduce.1 = f32[1,4,128]{2,1,0:T(8,128)} all-reduce(%layer), channel_id=1, replica_groups=mesh['x'=2,'y'=4] {'y'}, to_apply=%add, metadata={op_name="jit(step)/transpose(jvp(vit))/while/body/fc1"}
  ROOT %out = (s32[]{:T(128)}, f32[3,4,128]{2,1,0:T(8,128)}) tuple(%i, %stack)
}

%condition (loop.2: (s32[], f32[3,4,128])) -> pred[] {
  %loop.2 = (s32[]{:T(128)}, f32[3,4,128]{2,1,0:T(8,128)}) parameter(0)
  %limit = s32[]{:T(128)} constant(3)
  %at = s32[]{:T(128)} get-tuple-element(%loop.2), index=0
  ROOT %less = pred[]{:T(512)} compare(%at, %limit), direction=LT
}

%condition_of_data (loop.3: (s32[], f32[3,4,128])) -> pred[] {
  %loop.3 = (s32[]{:T(128)}, f32[3,4,128]{2,1,0:T(8,128)}) parameter(0)
  %most = s32[]{:T(128)} constant(20)
  %now = s32[]{:T(128)} get-tuple-element(%loop.3), index=0
  %fewer = pred[]{:T(512)} compare(%now, %most), direction=LT
  ROOT %and.1 = pred[]{:T(512)} and(%fewer, %fewer)
}

%words (loop.4: (s32[], f32[3,4,128])) -> (s32[], f32[3,4,128]) {
  %loop.4 = (s32[]{:T(128)}, f32[3,4,128]{2,1,0:T(8,128)}) parameter(0)
  %x = f32[3,4,128]{2,1,0:T(8,128)} get-tuple-element(%loop.4), index=1
  %copy.1 = f32[3,4,128]{2,1,0:T(8,128)} copy(%x)
  ROOT %same = (s32[]{:T(128)}, f32[3,4,128]{2,1,0:T(8,128)}) tuple(%x, %copy.1)
}

ENTRY %main (p0: f32[3,4,128], p1: bf16[8,256]) -> f32[3,4,128] {
  %p0 = f32[3,4,128]{2,1,0:T(8,128)} parameter(0)
  %p1 = bf16[8,256]{1,0:T(8,128)(2,1)} parameter(1)
  %zero = s32[]{:T(128)} constant(0)
  %room = f32[3,4,128]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %start = (s32[]{:T(128)}, f32[3,4,128]{2,1,0:T(8,128)}) tuple(%zero, %p0)
  %while.1 = (s32[]{:T(128)}, f32[3,4,128]{2,1,0:T(8,128)}) while(%start), condition=%condition, body=%body
  %while.2 = (s32[]{:T(128)}, f32[3,4,128]{2,1,0:T(8,128)}) while(%while.1), condition=%condition_of_data, body=%words
  %near = bf16[8,256]{1,0:T(8,128)(2,1)S(1)} copy(%p1)
  %all-gather.1 = bf16[64,256]{1,0:T(8,128)(2,1)} all-gather(%near), channel_id=2, replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="jit(step)/dynamic_update_slice"}
  %reduce-scatter.1 = bf16[2,256]{1,0:T(8,128)(2,1)} reduce-scatter(%p1), channel_id=3, replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, to_apply=%add
  %all-to-all.1 = bf16[8,256]{1,0:T(8,128)(2,1)} all-to-all(%p1), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %permute.1 = bf16[8,256]{1,0:T(8,128)(2,1)} collective-permute(%p1), channel_id=5, source_target_pairs={{0,3},{3,0}}
  %token = token[] after-all()
  %recv.1 = (bf16[2,8,256]{2,1,0}, u32[], token[]) recv(%token), channel_id=6, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_GATHER"}
  ROOT %result = f32[3,4,128]{2,1,0:T(8,128)} get-tuple-element(%while.2), index=1
}
"""  # noqa: E501  lines as the compiler writes them


def test_every_collective_with_its_bytes_count_and_group():
    found = {(c.kind, c.bytes, c.count): c for c in hlo.collectives(PROGRAM, 8)}
    groups = {kind: c.group for (kind, *_), c in found.items() if c.group}
    assert set(found) == {
        ("all-reduce", 4 * 128 * 4, 3),
        ("all-gather", 64 * 256 * 2, 1),
        ("all-gather", 2 * 8 * 256 * 2, 1),
        ("reduce-scatter", 8 * 256 * 2, 1),
        ("all-to-all", 8 * 256 * 2, 1),
        ("collective-permute", 8 * 256 * 2, 1),
    }
    assert groups == {
        "all-reduce": (0, 1, 2, 3),
        "all-gather": tuple(range(8)),
        "reduce-scatter": (0, 2, 4, 6),
        "all-to-all": (0, 4),
        "collective-permute": (0, 3),
    }
    assert found["all-gather", 8192, 1].group == ()  # the hosts' exchange between slices
    assert found["all-reduce", 2048, 3].op_name.endswith("while/body/fc1")


def test_sums_of_which_a_device_keeps_a_part_and_channels_that_several_collectives_share():
    gather = (
        'all-gather({x}), channel_id=1, replica_groups={{{{0,1,2,3}}}}, dimensions={{0}}, metadata={{op_name="{name}"}}'
    )
    text = f"""HloModule jit_step, is_scheduled=true

%all-reduce-scatter.3 (input: bf16[8,256]) -> bf16[2,256] {{
  %input = bf16[8,256]{{1,0}} parameter(0)
  %all-reduce.7 = bf16[8,256]{{1,0}} all-reduce(%input), channel_id=1, replica_groups={{{{0,1,2,3}}}}, to_apply=%add
  %place = u32[] partition-id()
  ROOT %part = bf16[2,256]{{1,0}} dynamic-slice(%all-reduce.7, %place, %place), dynamic_slice_sizes={{2,256}}
}}

%fused_start (a: bf16[2,256]) -> bf16[8,256] {{
  %a = bf16[2,256]{{1,0}} parameter(0)
  ROOT %all-gather.5 = bf16[8,256]{{1,0}} {gather.format(x="%a", name="values")}
}}

%async_collective_fusion.1 (b: bf16[2,256]) -> bf16[8,256] {{
  %b = bf16[2,256]{{1,0}} parameter(0)
  ROOT %all-gather.6 = bf16[8,256]{{1,0:T(8,128)S(1)}} {gather.format(x="%b", name="values")}
}}

ENTRY %main (p0: bf16[8,256], p1: bf16[2,256]) -> bf16[8,256] {{
  %p0 = bf16[8,256]{{1,0}} parameter(0)
  %p1 = bf16[2,256]{{1,0}} parameter(1)
  %sum = bf16[2,256]{{1,0}} fusion(%p0), kind=kCustom, calls=%all-reduce-scatter.3, metadata={{op_name="jit(step)/fc1"}}
  %keys = bf16[8,256]{{1,0}} {gather.format(x="%p1", name="keys")}
  %more = bf16[8,256]{{1,0}} {gather.format(x="%sum", name="keys")}
  %start = bf16[8,256]{{1,0}} fusion(%p1), kind=kCustom, calls=%fused_start
  ROOT %end = bf16[8,256]{{1,0}} fusion(%p1), kind=kCustom, calls=%async_collective_fusion.1
}}
"""  # noqa: E501  lines as the compiler writes them
    found = sorted((c.kind, c.op_name, c.bytes) for c in hlo.collectives(text, 4))
    assert found == [
        ("all-gather", "keys", 4096),
        ("all-gather", "keys", 4096),
        ("all-gather", "values", 4096),
        ("reduce-scatter", "jit(step)/fc1", 4096),
    ]


def test_collectives_of_the_sparsecores_and_a_loop_whose_first_turn_stands_before_it():
    """As the TPU compiler writes them at its usual level.

    Each call runs a computation of its own; all share a channel and have no name.
    """
    groups = "channel_id=1, replica_groups={{0,1,2,3}}, dimensions={0}"
    text = f"""HloModule jit_step, is_scheduled=true

%called (a: bf16[8,256], t: token[]) -> bf16[2,256] {{
  %a = bf16[8,256]{{1,0}} parameter(0)
  %t = token[] parameter(1)
  ROOT %scatter.1 = bf16[2,256]{{1,0}} reduce-scatter(%a), {groups}, to_apply=%add
}}, execution_thread="sparsecore"

%called.1 (b: bf16[8,256], u: token[]) -> bf16[2,256] {{
  %b = bf16[8,256]{{1,0}} parameter(0)
  %u = token[] parameter(1)
  ROOT %scatter.2 = bf16[2,256]{{1,0}} reduce-scatter(%b), {groups}, to_apply=%add
}}, execution_thread="sparsecore"

%body (state: (s32[], bf16[8,256])) -> (s32[], bf16[8,256]) {{
  %state = (s32[], bf16[8,256]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = bf16[8,256]{{1,0}} get-tuple-element(%state), index=1
  %one = ((bf16[8,256]{{1,0}}, token[]), bf16[2,256]{{1,0}}) call-start(%x, %i), async_execution_thread="sparsecore", to_apply=%called.1
  %part = bf16[2,256]{{1,0}} call-done(%one)
  ROOT %next = (s32[], bf16[8,256]{{1,0}}) tuple(%i, %x)
}}

%condition (state.1: (s32[], bf16[8,256])) -> pred[] {{
  %state.1 = (s32[], bf16[8,256]{{1,0}}) parameter(0)
  %at = s32[] get-tuple-element(%state.1), index=0
  %limit = s32[] constant(4)
  ROOT %less = pred[] compare(%at, %limit), direction=LT
}}

ENTRY %main (p0: bf16[8,256]) -> bf16[8,256] {{
  %p0 = bf16[8,256]{{1,0}} parameter(0)
  %token = token[] after-all()
  %first = s32[] constant(1)
  %from = s32[] copy(%first)
  %start = ((bf16[8,256]{{1,0}}, token[]), bf16[2,256]{{1,0}}) call-start(%p0, %token), async_execution_thread="sparsecore", to_apply=%called
  %done = bf16[2,256]{{1,0}} call-done(%start)
  %loop = (s32[], bf16[8,256]{{1,0}}) tuple(%from, %p0)
  %while = (s32[], bf16[8,256]{{1,0}}) while(%loop), condition=%condition, body=%body
  ROOT %out = bf16[8,256]{{1,0}} get-tuple-element(%while), index=1
}}
"""  # noqa: E501  lines as the compiler writes them
    found = sorted((c.kind, c.bytes, c.count, c.group) for c in hlo.collectives(text, 4))
    assert found == [("reduce-scatter", 4096, 1, (0, 1, 2, 3)), ("reduce-scatter", 4096, 3, (0, 1, 2, 3))]
    assert hlo.traffic(text) == 4 * (4096 + 1024) + 2 * 4  # what the collectives read and write; the copied counter


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups=mesh['x'=2,'y'=4] {'x'}", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=4] {'x','y'}", tuple(range(8))),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", (0, 4)),  # the outer part of an axis
        ("replica_groups=mesh['x'=8] {'x':(4)2}", (0, 1)),  # the inner one
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'x'}", (0, 1, 2, 3)),
        ("replica_groups=mesh['x'=4,'y'=2], device_ids=([2,4]T(1,0)) {'y'}", (0, 4)),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=(3,1,2,0) {'x'}", (3, 2)),
        ("source_target_pairs={{0,0},{6,2},{2,6}}", (2, 6)),  # the first that gets anything from another device
        ("source_target_pairs={{0,0},{1,1}}", (0,)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[4,2]", (0, 1)),
    ],
)
def test_ways_of_writing_groups(text, expected):
    assert hlo.group(text, 8) == expected


def test_groups_in_an_unknown_form_are_an_error():
    with pytest.raises(ValueError, match="not known here"):
        hlo.group("replica_groups=@new_form", 8)
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.collectives("nothing", 8)


def test_what_a_device_receives():
    assert (
        hlo.travels("all-reduce", 80, 4) == 120
        and hlo.travels("all-gather", 80, 4) == hlo.travels("reduce-scatter", 80, 4) == 60
    )
    assert hlo.travels("collective-permute", 80, 4) == 80 and hlo.travels("all-reduce", 80, 1) == 0


def test_traffic_counts_loops_slices_and_neither_fast_memory_nor_room():
    loop = 3 * (2 * 2048 + 4 + 2 * 2048)  # the slice read and written, the index, the all-reduce
    # copy into fast memory: its read alone; all-gather: its write alone
    once = 4096 + 32768 + (4096 + 1024) + 2 * 4096 + 2 * 4096
    words = 2 * 6144
    assert hlo.traffic(PROGRAM) - hlo.size("(bf16[2,8,256], u32[])") == loop + once + words
    assert hlo.traffic(PROGRAM, trips=7) - hlo.traffic(PROGRAM) == 6 * words
    assert hlo.size("(f32[2,3]{1,0}, pred[5]{0}, bf16[])") == 24 + 5 + 2


def test_a_program_for_gpus():
    """As the GPU's compiler writes it: asynchronous pairs with tuples of both ends, products by cuBLAS with room to
    work in, a loop whose condition is a fusion and whose turns it counted."""
    first, second = "mesh['axis_0'=2,'axis_1'=4], device_ids=([4,2]T(1,0)) {'axis_0'}", "mesh['axis_0'=8] {'axis_0'}"
    text = f"""HloModule jit_step, is_scheduled=true, num_partitions=8

FileNames
1 "step.py"

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}

%fused_slice (param_0: bf16[3,8,64], param_1: s32[]) -> bf16[1,8,64] {{
  %param_0 = bf16[3,8,64]{{2,1,0}} parameter(0), metadata={{scheduling_name="param_0"}}
  %param_1 = s32[] parameter(1)
  %nought = s32[] constant(0)
  %dynamic-slice.1 = bf16[1,8,64]{{2,1,0}} dynamic-slice(%param_0, %param_1, %nought, %nought), dynamic_slice_sizes={{1,8,64}}
  ROOT %copy.4 = bf16[1,8,64]{{2,1,0}} copy(%dynamic-slice.1)
}}

%fused_product (param_0.1: bf16[3,8,64], param_1.1: bf16[8,64], param_2.1: bf16[64,64], param_3.1: s32[]) -> (bf16[3,8,64], s8[4096]) {{
  %param_0.1 = bf16[3,8,64]{{2,1,0}} parameter(0)
  %param_1.1 = bf16[8,64]{{1,0}} parameter(1)
  %param_2.1 = bf16[64,64]{{1,0}} parameter(2)
  %custom-call.9 = (bf16[8,64]{{1,0}}, s8[4096]{{0}}) custom-call(%param_1.1, %param_2.1), custom_call_target="__cublas$gemm"
  %element.9 = bf16[8,64]{{1,0}} get-tuple-element(%custom-call.9), index=0
  %bitcast.9 = bf16[1,8,64]{{2,1,0}} bitcast(%element.9)
  %param_3.1 = s32[] parameter(3)
  %written = bf16[3,8,64]{{2,1,0}} dynamic-update-slice(%param_0.1, %bitcast.9, %param_3.1, %param_3.1, %param_3.1)
  %room.9 = s8[4096]{{0}} get-tuple-element(%custom-call.9), index=1
  ROOT %both = (bf16[3,8,64]{{2,1,0}}, s8[4096]{{0}}) tuple(%written, %room.9)
}}

%fused_compare (param_0.2: s32[]) -> pred[] {{
  %param_0.2 = s32[] parameter(0)
  %limit = s32[] constant(3)
  ROOT %lt.1 = pred[] compare(%param_0.2, %limit), direction=LT
}}

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

%body (state: (s32[], bf16[3,8,64], /*index=2*/bf16[8,64])) -> (s32[], bf16[3,8,64], bf16[8,64]) {{
  %state = (s32[], bf16[3,8,64]{{2,1,0}}, /*index=2*/bf16[8,64]{{1,0}}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %stack = bf16[3,8,64]{{2,1,0}} get-tuple-element(%state), index=1
  %x = bf16[8,64]{{1,0}} get-tuple-element(%state), index=2
  %layer = bf16[1,8,64]{{2,1,0}} fusion(%stack, %i), kind=kCustom, calls=%fused_slice
  %part = bf16[8,64]{{1,0}} bitcast(%layer)
  %all-gather-start = (bf16[8,64]{{1,0}}, bf16[16,64]{{1,0}}) all-gather-start(%part), channel_id=1, replica_groups={first}, dimensions={{0}}, metadata={{op_name="jit(step)/jvp(vit)/while/body/dot_general"}}, backend_config={{"collective_backend_config":{{"is_sync":false}}}}
  %all-gather-done = bf16[16,64]{{1,0}} all-gather-done(%all-gather-start)
  %custom-call.1 = (bf16[8,64]{{1,0}}, s8[33554432]{{0}}) custom-call(%x, %all-gather-done), custom_call_target="__cublas$lt$matmul"
  %y = bf16[8,64]{{1,0}} get-tuple-element(%custom-call.1), index=0
  ROOT %next = (s32[], bf16[3,8,64]{{2,1,0}}, bf16[8,64]{{1,0}}) tuple(%i, %stack, %y)
}}

%condition (state.1: (s32[], bf16[3,8,64], bf16[8,64])) -> pred[] {{
  %state.1 = (s32[], bf16[3,8,64]{{2,1,0}}, bf16[8,64]{{1,0}}) parameter(0)
  %at = s32[] get-tuple-element(%state.1), index=0
  ROOT %loop_compare_fusion = pred[] fusion(%at), kind=kLoop, calls=%fused_compare
}}

ENTRY %main (p0: bf16[3,8,64], p1: bf16[8,64], p2: bf16[64,64]) -> bf16[4,64] {{
  %p0 = bf16[3,8,64]{{2,1,0}} parameter(0), sharding={{devices=[1,2,1,4]<=[4,2]T(1,0) last_tile_dim_replicate}}
  %p1 = bf16[8,64]{{1,0}} parameter(1)
  %p2 = bf16[64,64]{{1,0}} parameter(2)
  %zero = s32[] constant(0)
  %start = (s32[], bf16[3,8,64]{{2,1,0}}, bf16[8,64]{{1,0}}) tuple(%zero, %p0, %p1)
  %while = (s32[], bf16[3,8,64]{{2,1,0}}, bf16[8,64]{{1,0}}) while(%start), condition=%condition, body=%body, backend_config={{"known_trip_count":{{"n":"3"}},"known_init_step":{{"init":"0","step":"1"}}}}
  %last = bf16[8,64]{{1,0}} get-tuple-element(%while), index=2
  %kept = (bf16[3,8,64]{{2,1,0}}, s8[4096]{{0}}) fusion(%p0, %last, %p2, %zero), kind=kCustom, calls=%fused_product
  %reduce-scatter-start = ((bf16[8,64]{{1,0}}), bf16[4,64]{{1,0}}) reduce-scatter-start(%last), channel_id=6, replica_groups={first}, dimensions={{0}}, to_apply=%add
  %reduce-scatter-done = bf16[4,64]{{1,0}} reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start = (bf16[4,64]{{1,0}}, bf16[8,64]{{1,0}}) all-reduce-start(%reduce-scatter-done, %p1), channel_id=4, replica_groups={second}, to_apply=%add, metadata={{op_name="jit(step)/transpose(jvp())/dot_general"}}
  %all-reduce-done = (bf16[4,64]{{1,0}}, bf16[8,64]{{1,0}}) all-reduce-done(%all-reduce-start)
  ROOT %out = bf16[4,64]{{1,0}} get-tuple-element(%all-reduce-done), index=0
}}
"""  # noqa: E501  lines as the compiler writes them
    part = 8 * 64 * 2
    found = {c.kind: (c.bytes, c.count, c.group, c.shapes) for c in hlo.collectives(text, 8)}
    assert found == {
        "all-gather": (2 * part, 3, (0, 1), "bf16[8,64]"),
        "reduce-scatter": (part, 1, (0, 1), "bf16[8,64]"),
        "all-reduce": (part // 2 + part, 1, tuple(range(8)), "bf16[8,64] and 1 more"),
    }
    # a turn: the slice read and written and its place, the part sent, a product of 8 and 16 rows, which reads its two
    # factors and writes its result, but nothing of the room it gets; the condition moves nothing
    turn = (2 * part + 4) + part + (part + 2 * part + part)
    kept = part + 64 * 64 * 2 + 4 + part  # into the stack goes one slice, and of it nothing is read
    assert hlo.traffic(text) == 3 * turn + kept + part + (part // 2 + part)

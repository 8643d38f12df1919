"""Every private PyTorch interface that xconv-fx leans on, in one place: a module for each of torch's subsystems.

Tested on the versions in `TESTED`. On another one `probe` says what is not as it was, before anything is compiled.
"""

from __future__ import annotations

from typing import Any

from .ahead import TracedWithin as TracedWithin
from .ahead import calls_functions as calls_functions
from .ahead import current_call as current_call
from .ahead import more_follows as more_follows
from .ahead import parts_of_graph as parts_of_graph
from .ahead import run_ahead as run_ahead
from .ahead import run_parts as run_parts
from .ahead import storage_of as storage_of
from .aot import ChangedElsewhere as ChangedElsewhere
from .aot import changed_inputs as changed_inputs
from .aot import changes as changes
from .aot import deduplicate as deduplicate
from .aot import draws as draws
from .aot import partition as partition
from .aot import recomputing as recomputing
from .autograd import as_called as as_called
from .autograd import at_end_of_backward as at_end_of_backward
from .autograd import in_backward as in_backward
from .autograd import nodes_made as nodes_made
from .autograd import nodes_of as nodes_of
from .backward import named_double_backward as named_double_backward
from .backward import repeatable as repeatable
from .compiled_apart import own_limit as own_limit
from .dynamo import call_behind as call_behind
from .dynamo import compiling_is_off as compiling_is_off
from .dynamo import gave_up as gave_up
from .dynamo import owner_of as owner_of
from .dynamo import skip as skip
from .dynamo import specialise as specialise
from .dynamo import watch_calls as watch_calls
from .dynamo import watch_frames as watch_frames
from .dynamo_graph import branches as branches
from .dynamo_graph import compile_call as compile_call
from .dynamo_graph import compiled_module as compiled_module
from .dynamo_graph import data_inputs as data_inputs
from .dynamo_graph import examples as examples
from .dynamo_graph import input_bytes as input_bytes
from .dynamo_graph import lost_change as lost_change
from .dynamo_graph import needs_backward as needs_backward
from .dynamo_graph import parameter_bytes as parameter_bytes
from .dynamo_graph import without_samples as without_samples
from .fake import fake_mode_of as fake_mode_of
from .fake import runs_on_fakes as runs_on_fakes
from .fake import trying_fake as trying_fake
from .frames import any_number_of_sizes as any_number_of_sizes
from .frames import callers as callers
from .frames import compilation as compilation
from .frames import compile_id as compile_id
from .frames import compiling_code as compiling_code
from .frames import forget as forget
from .frames import goes_on as goes_on
from .frames import while_compiling as while_compiling
from .fx import cheap_graphs as cheap_graphs
from .fx import graph_module as graph_module
from .indexing import cheap_strides as cheap_strides
from .inductor import ahead_of_time_backward as ahead_of_time_backward
from .inductor import cache_folder as cache_folder
from .inductor import channels_last_convolutions as channels_last_convolutions
from .inductor import compile_graph as compile_graph
from .inductor import compiler_settings as compiler_settings
from .inductor import cpp_compiler as cpp_compiler
from .inductor import decompositions as decompositions
from .inductor import fusion_rules as fusion_rules
from .inductor import generated_code as generated_code
from .inductor import known_settings as known_settings
from .inductor import saved_descriptor as saved_descriptor
from .inductor import setting as setting
from .inductor import settings_of as settings_of
from .interception import dispatch_modes as dispatch_modes
from .kernels import Deferred as Deferred
from .private_parts import needed as needed
from .private_parts import probe as probe
from .releases import early_releases as early_releases
from .version import TESTED as TESTED
from .version import is_tested as is_tested


def __getattr__(name: str) -> Any:
    # Its base class imports Inductor, which eager layers do without.
    if name == "Partitioner":
        from .partitioner import Partitioner

        return Partitioner
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

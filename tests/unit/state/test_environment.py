"""What a run ran on."""

import torch

from posttrain.state.environment import environment


def test_kernels_and_threads_that_decide_the_last_bits_are_written_down():
    found = environment()
    assert f"CPU capability usage: {found['cpu_kernels']}" in torch.__config__.show()
    assert f"at::get_num_threads() : {found['torch_threads']}\n" in torch.__config__.parallel_info()

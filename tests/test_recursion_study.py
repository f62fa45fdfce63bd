"""The study of recursion: loops and branches against what they must equal."""

import torch
import torch.nn.functional as F

from constellation.config import Kernel
from constellation.experiments import branching
from constellation.experiments.recursion_loops import after, loops
from constellation.kernel.model import KernelLM

TIED = Kernel(vocab_size=300, width=32, layers=3, heads=2, hidden=48, context=16, prelude=1, loops=3, coda=1)


def test_the_last_loop_is_the_kernel_itself():
    model, tokens = KernelLM(TIED, seed=1).eval(), torch.arange(64).view(4, 16)
    found = loops(model, tokens, tokens + 1)
    with torch.no_grad():
        assert torch.equal(after(model, tokens, 3), model.hidden(tokens))
        whole = F.cross_entropy(model(tokens).flatten(0, 1).double(), (tokens + 1).flatten())
    assert abs(found["nats"][-1] - float(whole)) < 1e-6
    assert len(found["nats"]) == 3 and len(found["step"]) == 2 and min(found["step"]) > 0


def test_an_adapter_changes_nothing_at_the_branch_and_trains_itself_alone():
    model, tokens = KernelLM(TIED, seed=1).eval(), torch.arange(16)[None]
    kernel, count = branching.branch(model, "adapter", None, 0, 1e-3, 0)
    with torch.no_grad():
        assert torch.equal(kernel(tokens), model(tokens))
    assert kernel.state_dict().keys() == model.state_dict().keys()
    assert abs(count / branching.ADAPTER - 1) < 0.05 and branching.branch(model, "full", None, 0, 1e-3, 0)[1] != count

"""The losses in a loop of your own: a table cut by hand, no pipeline, no TorchRec.

Run on two processes: torchrun --nproc-per-node 2 examples/hand_written_loop.py
"""

import torch
import torch.distributed as dist

from shardrec.kernels import RowShard, cut_cross_entropy

NUM_ITEMS, WIDTH = 1001, 32

dist.init_process_group("gloo")
rank, num_ranks = dist.get_rank(), dist.get_world_size()
torch.manual_seed(0)
table = torch.randn(NUM_ITEMS, WIDTH) * 0.1
first, last = NUM_ITEMS * rank // num_ranks, NUM_ITEMS * (rank + 1) // num_ranks
rows = table[first:last].clone().requires_grad_()  # this rank's part, its own optimizer
encoder = torch.nn.Linear(WIDTH, WIDTH)
optimizer = torch.optim.Adam([rows, *encoder.parameters()], lr=0.01)
shard = RowShard(rows, first_row=first, num_rows=NUM_ITEMS, group=dist.group.WORLD)
inputs = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(rank))
targets = torch.randint(0, NUM_ITEMS, (64,), generator=torch.Generator().manual_seed(rank))
for step in range(60):
    loss = cut_cross_entropy(encoder(inputs), shard, targets)  # mean over both ranks' positions
    loss.backward()
    for parameter in encoder.parameters():  # replicated: its gradient is a sum over ranks
        dist.all_reduce(parameter.grad)
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0 and step % 20 == 19:
        print(f"step {step + 1}: loss {loss:.4f}")
dist.destroy_process_group()

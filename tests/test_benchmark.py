"""benchmark.py is run by hand; here, that it still runs."""
import re

import torch

import benchmark


def test_every_row_but_the_compilers_runs(capsys):
    benchmark.main(["--small", *(row for row in benchmark.ROWS if row != "compile")])
    lines = capsys.readouterr().out.splitlines()
    values = [re.fullmatch(r".+?  +(\S+) ?\S* +\[\S+ - \S+\]", line) for line in lines[1:]]
    assert len(values) > 30 and all(v and float(v[1]) > 0 for v in values)


def test_operations_are_counted():
    a = torch.randn(2, 3, 8, 8, requires_grad=True)
    with benchmark.Flops() as flops:
        torch.nn.functional.conv2d(a, torch.randn(5, 3, 3, 3, requires_grad=True),
                                   padding=1).sum().backward()
    assert flops.total == 3 * 2 * (2 * 5 * 8 * 8) * (3 * 3 * 3)     # forward, and two backward


def test_attention_is_counted_on_a_cpu():
    q, k, v = torch.randn(3, 2, 3, 16, 8, requires_grad=True)       # 2 x 3 heads, 16 places
    with benchmark.Flops() as flops:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        forward = flops.total
        out.sum().backward()
    assert forward == 2 * 3 * (2 * 2 * 16 * 16 * 8)                 # q k, and weights v
    assert flops.total == forward + 2.5 * forward                   # backward: q k again, and four

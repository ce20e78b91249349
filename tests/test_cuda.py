import torch, pytest
from simulated_cuda import on_gpu, pretending_library
import ttt_plugins as tp


def test_first(on_gpu, method, kind, make_net, make_model, images):
    def run(sim):
        net = make_net(method, make_model(kind)).to("cuda:0")
        x = images(4).to("cuda:0")
        net(x)
        with sim.watching():
            out = net(x)
        assert out.device == torch.device("cuda:0")
        return dict(sim.reads), dict(sim.uploads), dict(sim.operations)

    reads, uploads, ops = on_gpu(run)
    print(method, kind, reads, uploads, sum(ops.values()))

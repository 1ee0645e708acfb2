"""One model that several threads call at the same time, as a server does."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from soft_mm import SOFT

ARCH = dict(embed_dims=(8, 8, 16, 16), num_heads=(1, 1, 2, 2), depths=(1, 1, 1, 1))
BOUNDED = dict(solver='cholesky', max_landmarks=7)
ATTENTIONS = {
    'default': None,
    'bounded cholesky': BOUNDED,
    'softmax-free stage 4': [{}, {}, {}, dict(BOUNDED, type='SoftmaxFreeAttention')],
    'random landmarks': dict(BOUNDED, sampler='random'),
}
SIZES = [(64, 128), (128, 64), (96, 96)]
THREADS, ANSWERS = 6, 60


@pytest.fixture
def frequent_switches():
    """Let the threads alternate within a forward pass."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize('name', ATTENTIONS)
def test_answers_of_six_threads_equal_those_of_one(name, frequent_switches):
    torch.manual_seed(0)
    model = SOFT(ARCH, attention=ATTENTIONS[name]).eval()
    images = [torch.randn(1, 3, *size) for size in SIZES * 2]
    start = threading.Barrier(THREADS)

    @torch.no_grad()
    def answer(image):
        return model(image)

    wanted = [answer(image) for image in images]

    def count_equal(thread):
        start.wait()
        equal = 0
        for index in range(thread, thread + ANSWERS):
            found = answer(images[index % len(images)])
            pairs = zip(found, wanted[index % len(images)], strict=True)
            equal += all(torch.equal(one, other) for one, other in pairs)
        return equal

    with ThreadPoolExecutor(THREADS) as pool:
        assert sum(pool.map(count_equal, range(THREADS))) == THREADS * ANSWERS

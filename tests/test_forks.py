"""Forked children finish with the right bits, whatever the parent's threads were doing, and so do these threads."""

from tests.cases import linux
from tests.test_backends import python


@linux
def test_a_child_forked_before_the_first_call_does_not_hang():
    """The parent has imported the package and used torch's threads, which the child does not have."""
    code = """
import os, torch, reparam_kernels as rk
torch.set_num_threads(2)
torch.ones(1 << 22).sum()
child = os.fork()
if child == 0:
    os._exit(0 if rk.randn(1 << 20, seed=3)[:2].equal(rk.randn(2, seed=3)) else 1)
print(os.waitpid(child, 0)[1])
"""
    assert python("import warnings; warnings.simplefilter('ignore')\n" + code).strip() == "0"


FORKS = """
import os, signal, sys, threading, time, warnings, torch, reparam_kernels as rk
warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
torch.set_num_threads(2)
# Made here, and compared as bytes: torch's own parallel ops would hang in a child.
mu, x, dz = (torch.full((1 << 14, 8), v) for v in (0.5, -0.25, 2.0))
dkl = torch.ones(1 << 14)

def work():
    leaves = mu.detach().requires_grad_(), x.detach().requires_grad_()
    outputs = rk.reparameterize_kl(*leaves, seed=7)
    return [t.detach().numpy().tobytes() for t in (*outputs, *torch.autograd.grad(outputs, leaves, (dz, dkl)))]

def right(*_):
    torch.set_num_threads(2)
    return work() == want

def in_threads():
    results = []
    threads = [threading.Thread(target=lambda: results.append(right())) for _ in range(3)]
    for t in threads: t.start()
    for t in threads: t.join()
    return results == [True] * 3

def in_a_child(body):
    child = os.fork()
    if child == 0:
        signal.alarm(20)  # a child that hangs is killed, and its status says so
        os._exit(0 if body() else 1)
    return os.waitpid(child, 0)[1] == 0

want = work()
"""

BUSY = (
    FORKS
    + """
stop, rounds, wrong = threading.Event(), [0] * 3, []

def busy(i):
    torch.set_num_threads(2)
    while not stop.is_set():
        rounds[i] += 1
        if work() != want: wrong.append(i)

def several():
    return right() and in_threads() and in_a_child(right) and right()

threads = [threading.Thread(target=busy, args=(i,)) for i in range(3)]
for t in threads: t.start()
while min(rounds) == 0: time.sleep(0.01)
passed = []
for i in range(40):
    seen, body = sum(rounds), (right, in_threads, lambda: in_a_child(right), several)[i % 4]
    passed.append(in_a_child(body))
    if not passed[-1]: break
    while sum(rounds) == seen: time.sleep(0.001)  # the parent's threads go on
    if i == 20:  # from a thread with workers of its own
        t = threading.Thread(target=lambda: passed.append(right() and in_a_child(several)))
        t.start(); t.join()
stop.set()
for t in threads: t.join()

def workers():
    torch.set_num_threads(2)
    time.sleep(1)  # for the workers of threads that ended to end
    before = len(os.listdir("/proc/self/task"))
    work()
    passed.append(len(os.listdir("/proc/self/task")) == before + 1)

t = threading.Thread(target=workers)  # the parent's calls still get a team
t.start(); t.join()
print(passed.count(False), len(passed), wrong, right())
"""
)


@linux
def test_forks_while_threads_are_inside_an_op():
    """Children, their children and their threads finish with the right bits, as do the parent's threads."""
    assert python(BUSY, timeout=300).strip() == "0 42 [] True"


@linux
def test_a_pool_of_forked_processes():
    """Each worker runs forward and backward repeatedly, after the parent has used its threads."""
    code = """
from multiprocessing import get_context
with get_context("fork").Pool(3) as pool:
    print(pool.map_async(right, range(30), chunksize=1).get(40) == [True] * 30, right())
"""
    assert python(FORKS + code).split() == ["True", "True"]

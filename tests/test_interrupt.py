import subprocess
import sys
import threading
import time
import weakref

from autoplace.interrupt import raise_in


class _Stop(BaseException):
    pass


def test_an_exception_reaches_the_thread_it_is_meant_for():
    caught, ready = [], threading.Event()

    def work():
        try:
            ready.set()
            while True:
                time.sleep(0.001)
        except _Stop:
            caught.append(threading.get_ident())

    thread = threading.Thread(target=work)
    thread.start()
    ready.wait(10)
    raise_in(thread.ident, _Stop)
    thread.join(10)
    assert caught == [thread.ident]


class _Thing:
    pass


def test_one_that_strikes_in_a_callback_is_not_printed_and_others_are(monkeypatch):
    told, inside, ended = [], threading.Event(), threading.Event()
    monkeypatch.setattr(sys, "unraisablehook", lambda event: told.append(event.exc_type))

    def slow(_ref):
        inside.set()
        while True:  # ends by the exception alone
            time.sleep(0.001)

    def fail(_ref):
        raise KeyError

    def work():
        for callback in (slow, fail):
            thing = _Thing()
            kept = weakref.ref(thing, callback)
            del thing
            assert kept() is None
        ended.set()

    thread = threading.Thread(target=work)
    thread.start()
    inside.wait(10)
    raise_in(thread.ident, _Stop)
    assert ended.wait(10), "the interpreter swallows it in the callback, and the thread goes on"
    thread.join(10)
    assert told == [KeyError]


STOPPED = """
import threading, time
from autoplace.interrupt import raise_in
def work():
    while True:
        time.sleep(0.001)
thread = threading.Thread(target=work)
thread.start()
raise_in(thread.ident, SystemExit)
thread.join(10)
"""


def test_a_thread_that_exits_says_nothing():
    done = subprocess.run([sys.executable, "-c", STOPPED], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

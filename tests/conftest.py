"""How the tests are run; the models that they share are in narrow.py."""

import gc
import os
import signal

# A job in the background (nohup, &) has Ctrl-C ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ["HF_HUB_OFFLINE"] = "1"  # before diffusers is imported: no test may download
os.environ["OMP_NUM_THREADS"] = "1"  # threads that wait for each other cost more than models this small; scripts too

import pytest

gc.disable()  # while a million objects come that stay, see cli/start.py


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """All of it takes all cores; files that are named take this process, since another would import torch anew."""
    return 0 if config.args_source is pytest.Config.ArgsSource.ARGS else min(os.cpu_count(), 4)


def pytest_sessionstart(session: pytest.Session) -> None:
    """The process that hands tests out to others (`dsession`) is spared the import of all that these compare with."""
    plugins = session.config.pluginmanager
    if not plugins.hasplugin("dsession"):
        plugins.import_plugin("narrow")
    gc.freeze()
    gc.enable()


def __getattr__(name: str) -> object:
    """Models of narrow.py, for whoever looks for them here; what pytest asks for must not import them."""
    if name != "randomise" and not name.startswith("NARROW_"):
        raise AttributeError(name)
    import narrow

    return getattr(narrow, name)

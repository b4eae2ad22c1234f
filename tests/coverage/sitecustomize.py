"""On the PYTHONPATH of `make coverage`: every Python process of the tests measures itself, Ray's workers too.

Most of those end by SIGKILL, or as Ray ends its workers, and then nothing is written at the end. So each writes what it
has from time to time. Ray carries actors' calls out in threads of its own, of which Python's tracing knows nothing:
they are told of it as they begin a call.
"""

import contextlib
import functools
import importlib.util
import inspect
import sys
import threading
import time
from collections.abc import Callable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import coverage

EVERY_S = 0.5
CALLS = "ray._private.function_manager"


def _save() -> None:
    while True:
        time.sleep(EVERY_S)
        running = coverage.Coverage.current()
        if running is not None:
            with contextlib.suppress(RuntimeError):  # its data were changed by another thread meanwhile
                running.save()


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, whose thread is measured from here on."""

    def here() -> None:
        if sys.gettrace() is None:
            sys.settrace(threading.gettrace())  # type: ignore[arg-type]

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        here()
        return function(*arguments, **named)

    @functools.wraps(function)
    async def answer(*arguments: Any, **named: Any) -> Any:
        here()
        return await function(*arguments, **named)

    return answer if inspect.iscoroutinefunction(function) else call


def _change(module: ModuleType) -> None:
    of_actors = module.FunctionActorManager
    made = of_actors._make_actor_method_executor
    of_actors._make_actor_method_executor = lambda *arguments, **named: _traced(made(*arguments, **named))
    of_actors.load_actor_class = _traced(of_actors.load_actor_class)


class _Calls(MetaPathFinder):
    """Changes the module in which Ray makes an actor's calls, as it is imported."""

    def find_spec(self, name: str, path: object, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != CALLS:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_change(module: ModuleType) -> None:
            execute(module)
            _change(module)

        spec.loader.exec_module = execute_and_change  # type: ignore[method-assign]
        return spec


coverage.process_startup()  # where coverage's own hook has not done so yet
if coverage.Coverage.current() is not None:
    sys.meta_path.insert(0, _Calls())
    threading.Thread(target=_save, daemon=True, name="coverage").start()

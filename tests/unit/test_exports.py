"""The names that users import are there, found lazily, and listed once."""

import importlib
import importlib.metadata
import pkgutil
from types import ModuleType

import pytest

import edit_ray

PUBLIC = {"EditWanPipeline", "LongVideoClient"}


def packages() -> list[ModuleType]:
    """edit_ray and its packages (not its modules)."""
    found = [info.name for info in pkgutil.walk_packages(edit_ray.__path__, "edit_ray.") if info.ispkg]
    return [edit_ray, *map(importlib.import_module, found)]


def test_the_two_entry_points_are_exported() -> None:
    assert set(edit_ray.__all__) >= PUBLIC | {"__version__"}


@pytest.mark.parametrize("package", packages(), ids=lambda package: package.__name__)
def test_every_listed_name_exists_once(package: ModuleType) -> None:
    names = list(getattr(package, "__all__", []))
    assert [name for name in names if not hasattr(package, name)] == []
    assert len(names) == len(set(names))
    assert set(names) <= set(dir(package)), "names that are loaded lazily belong in dir() too"


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_a_public_class_says_what_it_is(name: str) -> None:
    exported = getattr(edit_ray, name)
    assert isinstance(exported, type)
    assert exported.__name__ == name
    assert exported.__doc__


def test_an_unknown_name_is_an_attribute_error_that_names_it() -> None:
    with pytest.raises(AttributeError, match="EditWanPipelin"):
        edit_ray.EditWanPipelin  # noqa: B018


def test_the_version_is_the_installed_one() -> None:
    assert edit_ray.__version__ == importlib.metadata.version("edit_ray")

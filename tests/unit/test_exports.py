"""The names that users import are there, found lazily, and listed once."""

import importlib
import importlib.metadata
import pkgutil

import pytest

import edit_ray

PACKAGES = ["edit_ray", *(info.name for info in pkgutil.walk_packages(edit_ray.__path__, "edit_ray.") if info.ispkg)]


@pytest.mark.parametrize("name", PACKAGES)
def test_every_listed_name_exists_once(name: str) -> None:
    package = importlib.import_module(name)
    names = list(getattr(package, "__all__", []))
    assert [name for name in names if not hasattr(package, name)] == []
    assert len(names) == len(set(names))
    assert set(names) <= set(dir(package)), "names that are loaded lazily belong in dir() too"


def test_the_public_names_are_classes_that_say_what_they_are() -> None:
    assert set(edit_ray.__all__) == {"EditCausalWanPipeline", "EditWanPipeline", "LongVideoClient", "__version__"}
    for exported in (edit_ray.EditCausalWanPipeline, edit_ray.EditWanPipeline, edit_ray.LongVideoClient):
        assert exported.__name__ in edit_ray.__all__
        assert exported.__doc__
    assert edit_ray.__version__ == importlib.metadata.version("edit_ray")
    with pytest.raises(AttributeError, match="EditWanPipelin"):
        edit_ray.EditWanPipelin  # noqa: B018

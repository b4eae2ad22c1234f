"""Whatever happens to the files of a disk tier: a get is right or None, the file is removed, nothing is executed."""

import os
import pickle
import random
import tracemalloc
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from edit_ray.tiers.entry_file import file_name
from tests.unit.entry_folder import files_in, lost, on_disk

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


class Executed:
    def __reduce__(self):
        return pytest.fail, ("a file was unpickled",)


def rewrite(change):
    """Damage by a function that changes a file's bytes in place, or returns others."""

    def damage(chosen, path, _other):
        content = bytearray(path.read_bytes())
        path.write_bytes(change(chosen, content) or content)

    return damage


def flip(chosen, content, upto=None):
    for _ in range(chosen.choice([1, 1, 2, 10])):
        content[chosen.randrange(upto or len(content))] ^= 1 << chosen.randrange(8)


def swap_digits(chosen, content):
    """Of the header, as of a shape: no length and no single bit shows it."""
    digits = [index for index in range(8, 400) if content[index : index + 1].isdigit()]
    for _ in range(100):
        one, two = chosen.sample(digits, 2)
        content[one], content[two] = content[two], content[one]


def zero(chosen, content):
    start = chosen.choice([0, 4096])
    content[start:] = bytes(len(content) - start)


def swap_files(chosen, path, other):
    aside = path.with_name("aside")
    path.rename(aside)
    other.rename(path)
    aside.rename(other)


def become_foreign(chosen, path, other):
    chosen.choice(
        [
            lambda: torch.save({"tensor": Executed()}, path),
            lambda: path.write_bytes(pickle.dumps(Executed())),
            lambda: save_file({"tensor": torch.ones(3)}, path, {"key": '["a", 1]'}),
            lambda: save_file({"tensor": torch.ones(3)}, path),
            lambda: path.write_bytes(chosen.randbytes(chosen.randrange(20_000))),
            lambda: path.write_bytes((2**60).to_bytes(8, "little") + b"{}"),
            lambda: path.write_bytes((4088).to_bytes(8, "little") + b"[" * 4088),
            lambda: path.write_bytes((4088).to_bytes(8, "little") + b'{"__metadata__": 3}'.ljust(4088)),
            lambda: path.write_bytes(b""),
        ]
    )()


DAMAGES = {
    "truncate": lambda chosen, path, _other: os.truncate(path, chosen.randrange(path.stat().st_size)),
    "flip": rewrite(flip),
    "flip in the header": rewrite(lambda chosen, content: flip(chosen, content, 400)),
    "swap digits": rewrite(swap_digits),
    "zero": rewrite(zero),
    "grow": rewrite(lambda chosen, content: content + b"x" * chosen.choice([1, 4096, 10_000])),
    "swap files": swap_files,
    "become foreign": become_foreign,
}


def damage_some(folder, seed, count):
    """Put `count` entries, damage half of the files or more, read all; how often which was done, how many differed."""
    chosen = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    store, expected, done = on_disk(folder), {}, Counter()
    for number in range(count):
        shape = chosen.choice([(), (7,), (3, 50), (50, 3), (1024,), (2, 9, 70), (4, 0)])
        tensor = (torch.randn(shape, generator=generator) * 50).to(chosen.choice(DTYPES))
        key = ("run", seed, number, None)
        store.put(key, tensor)
        expected[key] = tensor
    whole = {key: (folder / file_name(key)).read_bytes() for key in expected}
    for key in chosen.sample(list(expected), count // 2):
        damage = chosen.choice(list(DAMAGES))
        other = chosen.choice([one for one in expected if one != key])
        DAMAGES[damage](chosen, folder / file_name(key), folder / file_name(other))
        done[damage] += 1
    damaged = {key for key, content in whole.items() if (folder / file_name(key)).read_bytes() != content}
    if seed % 2:
        store.close()
        store = on_disk(folder)
    for key, tensor in expected.items():
        found = store.get(key)
        if key in damaged:
            assert found is None
        else:
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(found, tensor)
    assert {path.name for path in files_in(folder)} == {file_name(key) for key in expected if key not in damaged}
    assert lost(store) == len(damaged)
    assert (len(store), store.files.faults["read"]) == (len(expected) - len(damaged), 0)
    store.clear()
    assert files_in(folder) == []
    return done, len(damaged)


@pytest.mark.parametrize("rounds", [3, pytest.param(100, marks=pytest.mark.slow)])
def test_damaged_entries_are_misses(tmp_path, rounds):
    """In rounds in which the store stays open or opens the folder again."""
    results = [damage_some(tmp_path, seed, 100) for seed in range(rounds)]
    assert set().union(*(done for done, _ in results)) == set(DAMAGES)
    assert sum(number for _, number in results) >= 45 * rounds


def test_an_earlier_file_of_the_same_key_is_not_taken_for_the_later(tmp_path):
    store = on_disk(tmp_path)
    store.put(("a",), torch.zeros(4))
    (path,) = files_in(tmp_path)
    earlier = path.read_bytes()
    store.put(("a",), torch.ones(4))
    path.write_bytes(earlier)
    assert store.get(("a",)) is None


@pytest.mark.parametrize("length", [2**60, 2**64 - 8, 2**64 - 1, 2**31, 100 << 20, 0, 1])
def test_a_length_out_of_bounds_takes_no_memory(tmp_path, length):
    path = tmp_path / file_name(("a",))
    path.write_bytes(length.to_bytes(8, "little") + b"{}")
    tracemalloc.start()
    store = on_disk(tmp_path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert (len(store), lost(store), files_in(tmp_path)) == (0, 1, [])


def test_names_like_ours_that_are_no_files_stay(tmp_path):
    target = tmp_path / "target"
    target.write_text("mine")
    (tmp_path / file_name(("a",))).symlink_to(target)
    (tmp_path / file_name(("b",))).mkdir()
    os.mkfifo(tmp_path / file_name(("c",)))
    store = on_disk(tmp_path)
    assert (len(store), lost(store), len(files_in(tmp_path))) == (0, 0, 4)
    store.put(("a",), torch.ones(3))
    assert torch.equal(store.get(("a",)), torch.ones(3))
    assert target.read_text() == "mine"

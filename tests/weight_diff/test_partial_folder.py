"""A folder is whole or not there, and nothing that is not ours is touched."""

import contextlib
import errno
import filecmp
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from weight_diff_pairs import assert_same_files, edited, load, recover, refused, write

import weight_diff
from alpaca.weight_diff import partial_folder
from alpaca.weight_diff.partial_folder import MARKER


def test_inputs_and_existing_folders_are_safe(pair, tmp_path):
    raw, tuned, diff = pair
    assert "an input of this command" in refused(weight_diff.recover, raw, diff, raw, overwrite=True)
    assert "an input of this command" in refused(
        weight_diff.make_diff, raw, tuned, os.path.dirname(raw), overwrite=True
    )
    out = tmp_path / "out"
    out.mkdir()
    write(out / "mine", "precious")
    assert "pass --overwrite" in refused(weight_diff.recover, raw, diff, str(out))
    assert os.listdir(out) == ["mine"]
    (tmp_path / "link").symlink_to(raw)
    assert "an input of this command" in refused(weight_diff.recover, raw, diff, str(tmp_path / "link"), overwrite=True)
    (out / "mine").unlink()
    for _ in range(2):  # into an empty folder, and over what is ours
        weight_diff.recover(raw, diff, str(out), test_inference=False, overwrite=True)
        assert_same_files(out, tuned)
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


def snapshot(folder) -> dict[str, bytes]:
    """Every path below a folder, with the bytes of files."""
    paths = [os.path.join(at, name) for at, folders, names in os.walk(folder) for name in [*folders, *names]]
    return {path: open(path, "rb").read() if os.path.isfile(path) else b"" for path in sorted(paths)}


def git_folder(out):
    (out / ".git").mkdir()
    write(out / ".git" / "HEAD", "ref: refs/heads/main")


STRANGE = {
    "a project without a manifest": (lambda out: (shutil.rmtree(out), out.mkdir(), git_folder(out)), "no manifest"),
    "a project around a model": (git_folder, "it also holds .git"),
    "a model card": (lambda out: write(out / "README.md", "mine"), "it also holds README.md"),
    "four more files": (lambda out: [write(out / f"{i}.txt", "") for i in range(4)], "0.txt, 1.txt, 2.txt and 1 more"),
    "an edited file": (lambda out: write(out / "generation_config.json", "{}"), "contents in generation_config.json"),
    "a folder in a file's place": (
        lambda out: ((out / "config.json").unlink(), (out / "config.json").mkdir()),
        "it also holds config.json",
    ),
    "a link": (
        lambda out: ((out / "config.json").unlink(), (out / "config.json").symlink_to("/dev/zero")),
        "it also holds config.json",
    ),
    "a manifest of another format": (lambda out: write(out / "weight_diff.json", "{}"), "weight_diff.json is damaged"),
    "another model": (lambda out: (out / "weight_diff.json").unlink(), "weight_diff.json is missing"),
}  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_overwrite_replaces_nothing_that_this_script_did_not_write(pair, tmp_path, monkeypatch, kind):
    raw, tuned, diff = pair
    out = tmp_path / "out"
    shutil.copytree(diff, out)
    change, complaint = STRANGE[kind]
    change(out)
    before = snapshot(tmp_path)
    monkeypatch.chdir(out)
    monkeypatch.setattr(weight_diff, "run_jobs", None)  # it is refused before the arithmetic
    for target in (str(out), "."):
        for function, other in ((weight_diff.recover, diff), (weight_diff.make_diff, tuned)):
            message = refused(function, raw, other, target, overwrite=True)
            assert message.startswith("--overwrite replaces only what this script wrote, and ")
            assert complaint in message
    assert snapshot(tmp_path) == before


def test_what_was_put_into_a_folder_while_it_was_being_replaced_is_kept(pair, tmp_path, monkeypatch):
    out, publish = shutil.copytree(pair[2], tmp_path / "out"), weight_diff.PartialFolder.publish

    def late(work, output):
        write(out / "mine", "precious")
        publish(work, output)

    monkeypatch.setattr(weight_diff.PartialFolder, "publish", late)
    message = refused(weight_diff.recover, pair[0], pair[2], str(out), test_inference=False, overwrite=True)
    assert "it also holds mine" in message
    assert (out / "mine").read_text() == "precious"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.txt"])
def test_what_cannot_be_copied_is_refused_before_the_arithmetic(pair, tmp_path, monkeypatch, kind, name):
    def spoil(folder):
        path = os.path.join(folder, name)
        if kind == "link":
            os.symlink("nowhere", path)
        elif kind == "folder":
            os.mkdir(path)
        else:
            os.mkfifo(path)

    monkeypatch.setattr(weight_diff, "run_jobs", None)
    raw, tuned, _ = edited(pair, tmp_path, 1, spoil)
    assert f"{name} is not a readable file" in refused(weight_diff.make_diff, raw, tuned, str(tmp_path / "out"))
    shutil.rmtree(tmp_path / "edited")
    raw, _, diff = edited(pair, tmp_path, 2, lambda folder: (os.unlink(f"{folder}/weight_diff.json"),
                                                             os.unlink(f"{folder}/corrections.safetensors"),
                                                             spoil(folder)))  # fmt: skip
    assert f"{name} is not a readable file" in refused(weight_diff.recover, raw, diff, str(tmp_path / "out"))
    assert os.listdir(tmp_path) == ["edited"]


def test_an_empty_output_name_is_not_the_working_folder(pair, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path / "mine")
    write(tmp_path / "mine" / "file", "precious")
    for overwrite in (False, True):
        assert "name is empty" in refused(weight_diff.make_diff, *pair[:2], "", overwrite=overwrite)
    assert os.listdir(tmp_path / "mine") == ["file"]


def test_a_folder_that_came_up_during_the_run_is_not_replaced(pair, tmp_path, monkeypatch):
    out, publish = tmp_path / "out", weight_diff.PartialFolder.publish

    def late(work, output):
        out.mkdir()
        write(out / "mine", "precious")
        publish(work, output)

    monkeypatch.setattr(weight_diff.PartialFolder, "publish", late)
    assert "move it away" in refused(weight_diff.recover, pair[0], pair[2], str(out), test_inference=False)
    assert os.listdir(out) == ["mine"]
    assert os.listdir(tmp_path) == ["out"]
    monkeypatch.undo()
    shutil.rmtree(out)
    weight_diff.recover(pair[0], pair[2], str(out), test_inference=False)
    assert_same_files(out, pair[1])


def test_too_small_a_disk_is_told_before_the_start(pair, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(100, 99, 1))
    assert "needs 64.2 MiB, 1 bytes are free on its disk" in refused(
        weight_diff.recover, pair[0], pair[2], str(tmp_path / "out")
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("reason", [errno.EOPNOTSUPP, errno.ENOSPC])
def test_disk_space_is_taken_at_the_start_where_the_file_system_can(pair, tmp_path, monkeypatch, reason):
    def fallocate(descriptor, offset, size):
        raise OSError(reason, os.strerror(reason))

    monkeypatch.setattr(os, "posix_fallocate", fallocate)
    if reason == errno.EOPNOTSUPP:
        assert_same_files(recover(pair[0], pair[2], str(tmp_path)), pair[1])
    else:
        assert "is full; make room" in refused(weight_diff.recover, pair[0], pair[2], str(tmp_path / "out"))
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("command", ["make_diff", "recover"])
def test_a_disk_that_fills_up_is_told_in_one_line_and_nothing_is_left(pair, tmp_path, monkeypatch, capsys, command):
    inputs = pair[:2] if command == "make_diff" else pair[::2]
    out, pwrite, calls = str(tmp_path / "out"), os.pwrite, []

    def full(descriptor, data, offset):
        calls.append(offset)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(descriptor, data, offset)

    monkeypatch.setattr(os, "pwrite", full)
    names = (
        ["--path_raw", "--path_tuned", "--path_diff"]
        if command == "make_diff"
        else ["--path_raw", "--path_diff", "--path_tuned"]
    )
    flags = [part for flag in zip(names, [*inputs, out], strict=True) for part in flag]
    with pytest.raises(SystemExit) as stopped:
        weight_diff.main([command, *flags])
    assert stopped.value.code == 2
    assert re.search(
        r"^error: the disk of .* is full; make room, then run the command again\n$", capsys.readouterr().err, re.M
    )
    assert os.listdir(tmp_path) == []
    monkeypatch.undo()
    getattr(weight_diff, command)(*inputs, out, **({"test_inference": False} if command == "recover" else {}))
    assert_same_files(out, pair[2] if command == "make_diff" else pair[1])


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_somebody_else_put_at_our_names_is_refused_and_left_alone(pair, tmp_path, name, kind):
    raw, tuned, diff = pair
    out, mine, place = tmp_path / "out", tmp_path / "mine", tmp_path / name
    shutil.copytree(diff, out)
    mine.mkdir()
    write(mine / "model.safetensors", "precious")
    if kind == "folder":
        mine.rename(place)
    elif kind == "link":
        place.symlink_to(mine)
    else:
        write(place, "precious")
    before = snapshot(tmp_path)
    for function, other in ((weight_diff.recover, diff), (weight_diff.make_diff, tuned)):
        message = refused(function, raw, other, str(out), overwrite=True)
        assert message.startswith(f"{place} exists, and this script didn't make it; move it, or name another --path_")
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["out.partial", "out.replaced"])
def test_a_marked_folder_with_a_folder_of_somebody_else_is_left_alone(pair, tmp_path, name):
    shutil.copytree(pair[2], tmp_path / "out")
    (tmp_path / name / ".git").mkdir(parents=True)
    write(tmp_path / name / MARKER, "")
    message = refused(weight_diff.recover, pair[0], pair[2], str(tmp_path / "out"), overwrite=True)
    assert "this script didn't make it" in message
    assert sorted(os.listdir(tmp_path / name)) == [".git", MARKER]


def test_an_untouched_replaced_folder_is_no_hindrance_without_overwrite(pair, tmp_path):
    (tmp_path / "out.replaced").mkdir()
    write(tmp_path / "out.replaced" / "mine", "precious")
    recover(pair[0], pair[2], str(tmp_path))
    assert os.listdir(tmp_path / "out.replaced") == ["mine"]


def test_a_second_run_is_refused_and_the_first_one_finishes(pair, tmp_path, monkeypatch):
    out, create = str(tmp_path / "out"), weight_diff.PartialFolder.create

    def with_rival(work, output):
        create(work, output)
        monkeypatch.undo()
        message = refused(weight_diff.recover, pair[0], pair[2], out)
        assert message == f"another run is writing {out}.partial; wait for it, or name another --path_tuned"

    monkeypatch.setattr(weight_diff.PartialFolder, "create", with_rival)
    weight_diff.recover(pair[0], pair[2], out, test_inference=False)
    assert_same_files(out, pair[1])


KILLED = """
import os, shutil, signal, sys, weight_diff
from alpaca.weight_diff import manifest, partial_folder, stream
moment, command, *folders = sys.argv[1:]
moments = iter(range(int(moment), -1, -1))
def counted(function):
    def call(*args, **kwargs):
        if next(moments) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)
    return call
stream.WINDOW = 256
stream.ByteCount.add = counted(stream.ByteCount.add)
os.rename = counted(os.rename)
os.unlink = counted(os.unlink)
os.rmdir = counted(os.rmdir)
partial_folder._mark = counted(partial_folder._mark)
manifest._write_text = counted(manifest._write_text)
getattr(weight_diff, command)(
    *folders, overwrite=True, **({"test_inference": False} if command == "recover" else {})
)
print(next(moments))
"""
LAST = 10**6


def killed(moment, *arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", KILLED, str(moment), *arguments], capture_output=True, text=True)


@pytest.mark.parametrize("command", ["make_diff", "recover"])
def test_after_a_kill_at_any_moment_the_same_command_starts_over(pair, tmp_path, command):
    """The moments are every rename, removal and small file at the end, and some windows before."""
    raw, tuned, diff = pair
    inputs, wanted = (
        ((raw, tuned), diff) if command == "make_diff" else ((raw, diff), recover(raw, diff, str(tmp_path)))
    )
    flags = {} if command == "make_diff" else {"test_inference": False}
    target = str(tmp_path / "killed")
    moments = LAST - int(killed(LAST, command, *inputs, target).stdout.split()[-1])
    shutil.rmtree(target)
    windows = sum(math.ceil(t.numel() / 256) for t in load(tuned).values())
    for moment in [*range(0, windows, windows // 4), *range(windows + 1, moments)]:
        assert killed(moment, command, *inputs, target).returncode == -signal.SIGKILL
        if os.path.exists(target):  # killed after the renaming
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{target}/{MARKER}")
            assert_same_files(target, wanted)
        else:
            partial = os.listdir(target + ".partial")
            weights = [n for n in partial if n.endswith(".safetensors") and n != "corrections.safetensors"]
            assert moment > windows or (not weights and "config.json" not in partial)
        getattr(weight_diff, command)(*inputs, target, overwrite=True, **flags)
        assert_same_files(target, wanted)
        assert sorted(os.listdir(target)) == sorted(os.listdir(wanted))
        assert not [name for name in os.listdir(tmp_path) if name.endswith((".partial", ".replaced"))]
        shutil.rmtree(target)


def test_a_kill_while_a_folder_is_replaced_leaves_the_old_one_or_the_new_one(pair, tmp_path):
    raw, tuned, diff = pair
    target, old = str(tmp_path / "out"), tmp_path / "old"
    weight_diff.recover(raw, diff, str(old), test_inference=False, dtype="float16")
    shutil.copytree(old, target)
    moments = LAST - int(killed(LAST, "recover", raw, diff, target).stdout.split()[-1])
    for moment in range(moments - 12, moments):
        shutil.rmtree(target)
        shutil.copytree(old, target)
        assert killed(moment, "recover", raw, diff, target).returncode == -signal.SIGKILL
        kept = [path for path in (target, target + ".replaced") if os.path.isdir(path) and holds(path, old)]
        whole = [path for path in (target, target + ".partial") if os.path.exists(f"{path}/weight_diff.json")]
        assert kept or whole
        weight_diff.recover(raw, diff, target, test_inference=False, overwrite=True)
        assert_same_files(target, tuned)
        assert sorted(os.listdir(tmp_path)) == ["old", "out"]


def holds(folder, wanted) -> bool:
    return filecmp.cmpfiles(wanted, folder, os.listdir(wanted), shallow=False)[1:] == ([], [])


@pytest.mark.parametrize("killed_at", ["writing", "renaming", "clearing"])
def test_after_a_kill_a_run_that_fits_on_the_disk_is_not_refused(pair, tmp_path, monkeypatch, killed_at):
    """The disk holds the old model, the new one and the reserve, and no more; what the killed run left adds nothing."""
    raw, tuned, diff = pair
    out = tmp_path / "out"
    weight_diff.recover(raw, diff, str(out), test_inference=False)
    used = lambda: sum(len(data) for data in snapshot(tmp_path).values())  # noqa: E731
    weights = sum(os.path.getsize(out / name) for name in os.listdir(out) if name.endswith(".safetensors"))
    capacity = used() + weights + partial_folder._SPARE_BYTES
    if killed_at == "writing":
        shutil.copytree(out, tmp_path / "out.partial")
        write(tmp_path / "out.partial" / MARKER, "")
    elif killed_at == "renaming":  # the old one has its name no more, the new one not yet
        out.rename(tmp_path / "out.replaced")
        write(tmp_path / "out.replaced" / MARKER, "")
        shutil.copytree(tmp_path / "out.replaced", tmp_path / "out.partial")
    else:
        shutil.copytree(out, tmp_path / "out.replaced")
        write(tmp_path / "out.replaced" / MARKER, "")
    usage = lambda path: shutil._ntuple_diskusage(capacity, used(), capacity - used() + 100)  # noqa: E731
    monkeypatch.setattr(shutil, "disk_usage", usage)
    weight_diff.recover(raw, diff, str(out), test_inference=False, overwrite=True)
    assert_same_files(out, tuned)
    assert os.listdir(tmp_path) == ["out"]

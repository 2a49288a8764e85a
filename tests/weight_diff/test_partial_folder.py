"""A folder is whole or not there, and nothing that is not ours is touched."""

import contextlib
import errno
import math
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from weight_diff_pairs import assert_same_files, load, recover, refused, write

import weight_diff
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
    weight_diff.recover(raw, diff, str(out), test_inference=False, overwrite=True)
    assert_same_files(out, tuned)
    assert sorted(os.listdir(tmp_path)) == ["link", "out"]


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
    assert "GB are free on its disk" in refused(weight_diff.recover, pair[0], pair[2], str(tmp_path / "out"))
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
    for folder in (out, mine):
        folder.mkdir()
        write(folder / "model.safetensors", "precious")
    if kind == "folder":
        mine.rename(place)
    elif kind == "link":
        place.symlink_to(mine)
    else:
        write(place, "precious")
    before = sorted(os.listdir(tmp_path))
    for function, other in ((weight_diff.recover, diff), (weight_diff.make_diff, tuned)):
        message = refused(function, raw, other, str(out), overwrite=True)
        assert message.startswith(f"{place} exists, and this script didn't make it; move it, or name another --path_")
    assert sorted(os.listdir(tmp_path)) == before
    precious = [place] if kind == "file" else [place / "model.safetensors"]
    for path in [out / "model.safetensors", *precious]:
        assert path.read_text() == "precious"


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
    target = str(tmp_path / "out")

    def old_model():
        os.makedirs(f"{target}/a")
        write(f"{target}/model.safetensors", "old")
        write(f"{target}/a/b", "old")

    old_model()
    moments = LAST - int(killed(LAST, "recover", raw, diff, target).stdout.split()[-1])
    for moment in range(moments - 12, moments):
        shutil.rmtree(target)
        old_model()
        assert killed(moment, "recover", raw, diff, target).returncode == -signal.SIGKILL
        kept = [path for path in (target, target + ".replaced") if os.path.exists(f"{path}/model.safetensors")]
        whole = [path for path in (target, target + ".partial") if os.path.exists(f"{path}/weight_diff.json")]
        assert kept or whole
        weight_diff.recover(raw, diff, target, test_inference=False, overwrite=True)
        assert_same_files(target, tuned)
        assert os.listdir(tmp_path) == ["out"]

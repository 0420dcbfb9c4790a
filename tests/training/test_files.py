"""Files that can be relied on: checked before use, whole or old, one writer at a time."""

import os
import subprocess
import sys
import textwrap
import threading
import zipfile

import pytest
import torch

from mnist_ops.training import _files


def state():
    return {
        "epoch": 3,
        "name": "original",
        "weight": torch.randn(40, dtype=torch.float64),
        "order": torch.arange(9).view(3, 3).t(),
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(x, y) if isinstance(x, torch.Tensor) else type(x) is type(y) and x == y
        for x, y in zip(a.values(), b.values(), strict=True)
    )


def in_a_process(code, *arguments, **options):
    """Not a fork of this one: torch's threads are not in it, and their work is waited for."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True, text=True, timeout=100, **options,
    )  # fmt: skip


class TestReadTorch:
    def test_round_trip(self, tmp_path):
        expected = state()
        _files.write_torch(tmp_path / "a.pt", expected)
        assert same(_files.read_torch(tmp_path / "a.pt"), expected)

    def test_checksums_are_written_always(self, tmp_path):
        torch.serialization.set_crc32_options(False)
        try:
            _files.write_torch(tmp_path / "a.pt", state())
            assert not torch.serialization.get_crc32_options()
        finally:
            torch.serialization.set_crc32_options(True)
        _files.read_torch(tmp_path / "a.pt")

    def test_no_flipped_bit_goes_unnoticed(self, tmp_path):
        """One bit of a byte: refused, or it was none that says anything, as of the padding."""
        path = tmp_path / "a.pt"
        expected = state()
        _files.write_torch(path, expected)
        whole = path.read_bytes()
        with zipfile.ZipFile(path) as archive:
            begins = [
                record.header_offset + 30 + int.from_bytes(whole[k + 26 : k + 28], "little")
                + int.from_bytes(whole[k + 28 : k + 30], "little")
                for record in archive.infolist() if (k := record.header_offset) >= 0
            ]  # fmt: skip
            content = {
                i
                for begin, record in zip(begins, archive.infolist(), strict=True)
                for i in range(begin, begin + record.file_size)
            }
        accepted = 0
        for i in range(len(whole)):
            if i in content and i % 16:
                continue
            damaged = bytearray(whole)
            damaged[i] ^= 1 << (i * 5) % 8
            path.write_bytes(damaged)
            try:
                value = _files.read_torch(path)
            except _files.DamagedFileError as error:
                assert str(error).startswith(f"{path} is damaged")
            else:
                assert i not in content
                assert same(value, expected), i
                accepted += 1
        assert accepted < len(whole) / 2

    def test_blocks_of_zeros(self, tmp_path):
        path = tmp_path / "a.pt"
        _files.write_torch(path, {"weight": torch.randn(5000)})
        whole = path.read_bytes()
        for begin in range(1024, 20000, 4096):
            path.write_bytes(whole[:begin] + bytes(512) + whole[begin + 512 :])
            with pytest.raises(_files.DamagedFileError, match=r"record archive/data/0 is not"):
                _files.read_torch(path)

    @pytest.mark.parametrize("keep", [0, 1, 21, 22, 300, -1, -30, -500])
    def test_truncated_and_too_long(self, tmp_path, keep):
        path = tmp_path / "a.pt"
        _files.write_torch(path, state())
        whole = path.read_bytes()
        for content in (whole[:keep], whole + whole[:keep] + b"x"):
            path.write_bytes(content)
            with pytest.raises(_files.DamagedFileError):
                _files.read_torch(path)

    def test_packed(self, tmp_path):
        """A 3 MB file of 2 GB would be unpacked to its size; torch.save never packs."""
        path = tmp_path / "a.pt"
        _files.write_torch(tmp_path / "b.pt", {"weight": torch.zeros(100_000)})
        with (
            zipfile.ZipFile(tmp_path / "b.pt") as source,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for record in source.infolist():
                packed.writestr(record.filename, source.read(record))
        with pytest.raises(_files.DamagedFileError, match="compressed"):
            _files.read_torch(path)

    @pytest.mark.parametrize(
        "value",
        [
            torch.zeros(1).expand(600_000_000),
            torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0)),
            torch.sparse_coo_tensor(torch.zeros(1, 1), torch.zeros(1), (10**9,)),
            torch.empty(10**12, device="meta"),
        ],
        ids=["expanded", "as_strided", "sparse", "meta"],
    )
    def test_tensors_larger_than_the_file(self, tmp_path, value):
        torch.save({"settings": [{"x": (value,)}]}, tmp_path / "a.pt")
        assert (tmp_path / "a.pt").stat().st_size < 10_000
        with pytest.raises(_files.DamagedFileError):
            _files.read_torch(tmp_path / "a.pt")

    def test_views_that_are_no_larger(self, tmp_path):
        whole = torch.arange(24.0).view(4, 6)
        torch.save([whole, whole.t(), whole[1:, ::2]], tmp_path / "a.pt")
        values = _files.read_torch(tmp_path / "a.pt")
        assert torch.equal(values[2], whole[1:, ::2])

    def test_lists_within_each_other_do_not_take_for_ever(self, tmp_path):
        value = [1]
        for _ in range(60):
            value = [value, value]  # 2**60 ways through it
        torch.save(value, tmp_path / "a.pt")
        _files.read_torch(tmp_path / "a.pt")

    def test_code_is_never_run(self, tmp_path):
        class Harmful:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "harm"),)

        torch.save(Harmful(), tmp_path / "a.pt")
        with pytest.raises(_files.DamagedFileError):
            _files.read_torch(tmp_path / "a.pt")
        assert not (tmp_path / "harm").exists()

    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError):
            _files.read_torch(tmp_path / "a.pt")


class TestWriting:
    def test_old_file_is_kept(self, tmp_path):
        for i in range(3):
            _files.write_torch(tmp_path / "a.pt", i, keep=tmp_path / "b.pt")
        assert _files.read_torch(tmp_path / "a.pt") == 2
        assert _files.read_torch(tmp_path / "b.pt") == 1
        assert sorted(os.listdir(tmp_path)) == ["a.pt", "b.pt"]

    def test_what_a_link_leads_to_is_replaced(self, tmp_path):
        target, link = tmp_path / "there" / "a.pt", tmp_path / "link.pt"
        target.parent.mkdir()
        link.symlink_to(target)
        for i in range(2):  # the first where nothing is yet
            _files.write_torch(link, i, keep=tmp_path / "b.pt")
            assert link.is_symlink() and _files.read_torch(target) == i
        assert _files.read_torch(tmp_path / "b.pt") == 0
        assert os.listdir(target.parent) == ["a.pt"]
        circle = tmp_path / "circle"
        circle.symlink_to(circle)
        _files.write_text(circle, "whole")
        assert circle.read_text() == "whole"

    def test_a_pipe_is_written_to(self, tmp_path):
        pipe, link, found = tmp_path / "pipe", tmp_path / "link", []
        os.mkfifo(pipe)
        link.symlink_to(pipe)
        for path in (pipe, link):
            reader = threading.Thread(target=lambda: found.append(pipe.read_text()), daemon=True)
            reader.start()
            _files.write_text(path, "all of it")
            reader.join(60)
            assert pipe.is_fifo()
        assert found == ["all of it"] * 2
        assert sorted(os.listdir(tmp_path)) == ["link", "pipe"]

    def test_what_cannot_be_written_is_named(self, tmp_path):
        """A folder, a missing one, and a pipe that nobody reads to its end."""
        for path in (tmp_path, tmp_path / "missing" / "a"):
            with pytest.raises(OSError) as caught:
                _files.write_text(path, "all of it")
            assert caught.value.filename == str(path)
        pipe = tmp_path / "pipe"
        os.mkfifo(pipe)
        reader = threading.Thread(target=lambda: pipe.open("rb").close(), daemon=True)
        reader.start()

        def write(file):
            reader.join(60)
            file.write(bytes(10))

        with pytest.raises(BrokenPipeError) as caught:
            _files.write_atomically(pipe, write)
        assert caught.value.filename == str(pipe) and os.listdir(tmp_path) == ["pipe"]

    def test_half_written(self, tmp_path):
        def write(file):
            file.write(b"half of it")
            raise KeyboardInterrupt

        _files.write_text(tmp_path / "a", "whole")
        with pytest.raises(KeyboardInterrupt):
            _files.write_atomically(tmp_path / "a", write)
        assert (tmp_path / "a").read_text() == "whole"
        assert os.listdir(tmp_path) == ["a"]

    def test_full_disk(self, tmp_path):
        """A limit on the size of files stands for it: both come as OSErrors of the system."""
        _files.write_torch(tmp_path / "a.pt", "old", keep=tmp_path / "b.pt")

        result = in_a_process(
            """
            import resource, sys
            import torch
            from pathlib import Path
            from mnist_ops.training import _files
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
            path = Path(sys.argv[1])
            try:
                _files.write_torch(path / "a.pt", torch.zeros(100_000), keep=path / "b.pt")
            except OSError as error:
                print(error)
            """,
            tmp_path,
        )
        assert result.stdout == f"[Errno 27] File too large: '{tmp_path / 'a.pt'}'\n", result.stderr
        assert _files.read_torch(tmp_path / "a.pt") == "old"
        assert os.listdir(tmp_path) == ["a.pt"]

    def test_text_is_utf_8_everywhere(self, tmp_path):
        environment = os.environ | {
            "LC_ALL": "C",
            "PYTHONIOENCODING": "ascii",
            "PYTHONUTF8": "0",
            "PYTHONCOERCECLOCALE": "0",
        }
        code = """
            import sys
            from mnist_ops.training import _files
            _files.write_text(sys.argv[1], "Polack-Ribi\\xe8re \\udcff")
        """
        result = in_a_process(code, tmp_path / "a.txt", env=environment)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / "a.txt").read_bytes() == b"Polack-Ribi\xc3\xa8re \xff"


class TestLocked:
    def test_other_processes_and_threads_are_refused(self, tmp_path):
        code = """
            import sys
            from mnist_ops.training import _files
            for _ in sys.stdin:
                try:
                    with _files.locked(sys.argv[1]):
                        print("locked", flush=True)
                except _files.FolderInUseError as error:
                    print(error, flush=True)
        """
        command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        other = subprocess.Popen(command, bufsize=1, **pipes)

        def tried_there():
            other.stdin.write("\n")
            return other.stdout.readline()

        found = []

        def try_it():
            try:
                with _files.locked(tmp_path):
                    found.append("locked")
            except _files.FolderInUseError as error:
                found.append(str(error))

        with _files.locked(tmp_path):
            with _files.locked(tmp_path / "." / "sub" / ".."):  # this thread may
                pass
            assert tried_there() == f"another process is at work in {tmp_path}\n"
            thread = threading.Thread(target=try_it)
            thread.start()
            thread.join()
        assert found == [f"another process is at work in {tmp_path}"]
        assert tried_there() == "locked\n"
        other.communicate()

    def test_an_error_releases_it(self, tmp_path):
        for _ in range(2):
            with pytest.raises(KeyError), _files.locked(tmp_path / "new" / "folder"):
                raise KeyError

    def test_parts_of_killed_runs_are_swept(self, tmp_path):
        code = """
            import os, signal, sys
            from pathlib import Path
            from mnist_ops.training import _files
            def write(file):
                file.write(b"half of it")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            with _files.locked(sys.argv[1]):
                _files.write_atomically(Path(sys.argv[1], "checkpoint.pt"), write)
        """
        in_a_process(code, tmp_path)
        (part,) = [name for name in os.listdir(tmp_path) if name.endswith(".part")]
        others = ["mine.part", ".hidden.part", "checkpoint.pt.1.part"]
        for name in others:
            (tmp_path / name).touch()
        with _files.locked(tmp_path):
            assert sorted(os.listdir(tmp_path)) == sorted([*others, ".lock"])
        assert part.startswith(".checkpoint.pt.")

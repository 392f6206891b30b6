"""P3: archives can neither escape their folder nor explode in it."""

import gzip
import io
import random
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loraplex_adapters.archives import unpack_archive, write_files
from loraplex_adapters.errors import AdapterError, AdapterTooLarge, InvalidAdapter

MIB = 1 << 20
Members = list[tuple[str, bytes]]


def make_zip(members: Members, compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, compression)
    return buffer.getvalue()


def make_tar(members: Members, mode: str = "w", kind: int = tarfile.PAX_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode, format=kind) as archive:  # type: ignore[call-overload]
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


MAKERS: dict[str, Callable[[Members], bytes]] = {
    "zip": make_zip,
    "stored zip": lambda members: make_zip(members, zipfile.ZIP_STORED),
    "tar": make_tar,
    "gnu tar": lambda members: make_tar(members, kind=tarfile.GNU_FORMAT),
    "ustar": lambda members: make_tar(members, kind=tarfile.USTAR_FORMAT),
    "tar.gz": lambda members: make_tar(members, "w:gz"),
}
each_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def unpack(content: bytes, into: Path, **limits: int) -> dict[str, bytes]:
    unpack_archive(io.BytesIO(content), into, **{"max_bytes": 64 * MIB, **limits})
    return {str(path.relative_to(into)): path.read_bytes() for path in into.rglob("*") if path.is_file()}


def refuse(content: bytes, into: Path, **limits: int) -> AdapterError:
    with pytest.raises(AdapterError) as refusal:
        unpack(content, into, **limits)
    return refusal.value


@each_maker
@pytest.mark.parametrize("top", ["", "./", "my-adapter/", "./my-adapter/"])
def test_contents_come_out_without_the_top_folder(make: Callable[[Members], bytes], top: str, folder: Path) -> None:
    members = [("adapter_config.json", b"{}"), ("adapter_model.safetensors", random.Random(0).randbytes(700_001))]
    packed = make([(top + name, content) for name, content in members])

    assert unpack(packed, folder) == dict(members)


def test_paths_and_directories_are_taken(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x").write_bytes(b"1")
    with tarfile.open(tmp_path / "a.tgz", "w:gz") as archive:
        archive.add(tmp_path / "a", arcname=".")

    unpack_archive(tmp_path / "a.tgz", folder, max_bytes=MIB)

    assert (folder / "x").read_bytes() == b"1"


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_are_read(kind: int, folder: Path) -> None:
    name = "a/" + "x" * 180

    assert unpack(make_tar([(name, b"1"), ("b", b"2")], kind=kind), folder) == {name: b"1", "b": b"2"}


@each_maker
def test_desktop_litter_is_left_out(make: Callable[[Members], bytes], folder: Path) -> None:
    members = [("a/x", b"1"), ("__MACOSX/a/._x", b"2"), ("a/._x", b"3"), (".DS_Store", b"4")]

    assert unpack(make(members), folder) == {"x": b"1"}


@each_maker
@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/x", "//x", "a/..", "..", "c:x", "a\\x", "a\nb", "a/" * 20 + "x", "y" * 300 + "/x"],
)
def test_names_that_escape_are_refused(make: Callable[[Members], bytes], name: str, folder: Path) -> None:
    try:
        packed = make([(name, b"x")])
    except ValueError:
        pytest.skip("this format cannot hold the name")

    assert refuse(packed, folder).code in ("archive_unsafe", "archive_broken")
    assert not (folder.parent / "x").exists()


@each_maker
@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("x", "x"), ("x", "./x"), ("x", "x/y"), ("x/y", "x")])
def test_duplicates_are_refused(make: Callable[[Members], bytes], names: tuple[str, str], folder: Path) -> None:
    assert refuse(make([(name, b"1") for name in names]), folder).code == "archive_unsafe"


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
        tarfile.GNUTYPE_SPARSE,
        b"Z",
    ],
)
@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_links_and_devices_in_tars_are_refused(kind: bytes, mode: str, folder: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        info = tarfile.TarInfo("adapter_config.json")
        info.type, info.linkname = kind, "/etc/passwd"
        archive.addfile(info)

    assert refuse(buffer.getvalue(), folder).code == "archive_unsafe"
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("mode", [0o120777, 0o020666, 0o060666, 0o010666, 0o140777])
def test_links_and_devices_in_zips_are_refused(mode: int, folder: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("adapter_config.json")
        info.create_system, info.external_attr = 3, mode << 16
        archive.writestr(info, "/etc/passwd")

    assert refuse(buffer.getvalue(), folder).code == "archive_unsafe"


def test_encrypted_and_exotic_zips_are_refused(folder: Path) -> None:
    encrypted = bytearray(make_zip([("x", b"1")], zipfile.ZIP_STORED))
    directory = encrypted.index(b"PK\x01\x02")
    encrypted[directory + 8] |= 1
    assert refuse(bytes(encrypted), folder).code == "archive_unsafe"
    assert refuse(make_zip([("x", b"1" * 1000)], zipfile.ZIP_LZMA), folder).code == "archive_unsafe"
    assert refuse(make_zip([("x", b"1" * 1000)], zipfile.ZIP_BZIP2), folder).code == "archive_unsafe"


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_thousand_to_one_is_refused(kind: str, folder: Path) -> None:
    bomb = MAKERS[kind]([("adapter_model.safetensors", bytes(64 * MIB))])
    assert len(bomb) < 128 * 1024

    assert refuse(bomb, folder, max_bytes=1 << 40).code == "archive_ratio"
    assert sum(path.stat().st_size for path in folder.rglob("*")) < 16 * MIB


@each_maker
def test_the_byte_cap_holds_while_unpacking(make: Callable[[Members], bytes], folder: Path) -> None:
    packed = make([("a", random.Random(0).randbytes(3 * MIB))])

    assert isinstance(refuse(packed, folder, max_bytes=MIB), AdapterTooLarge)
    assert sum(path.stat().st_size for path in folder.rglob("*")) <= MIB


@each_maker
def test_too_many_files_are_refused(make: Callable[[Members], bytes], folder: Path) -> None:
    packed = make([(str(i), b"") for i in range(101)])

    assert refuse(packed, folder, max_files=100).code == "too_many_files"


def test_a_lying_zip_directory_is_refused_before_it_is_read(folder: Path) -> None:
    packed = bytearray(make_zip([("x", b"1")]))
    struct.pack_into("<HHL", packed, len(packed) - 22 + 8, 65535, 65535, 1 << 31)
    assert refuse(bytes(packed), folder).code == "too_many_files"

    locator = b"PK\x06\x07" + bytes(16)
    packed = bytearray(make_zip([("x", b"1")]))
    packed[-22:-22] = locator
    assert refuse(bytes(packed), folder).code == "archive_zip64"


def test_huge_extended_tar_headers_are_refused_in_bounded_memory(folder: Path) -> None:
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME):
        info = tarfile.TarInfo("x")
        info.type, info.size = kind, 1 << 32
        bomb = gzip.compress(info.tobuf(tarfile.USTAR_FORMAT) + bytes(MIB))

        assert refuse(bomb, folder).code == "archive_broken"


def test_archives_inside_archives_stay_packed(folder: Path) -> None:
    inner = make_zip([("../escape", bytes(32 * MIB))])

    assert unpack(make_zip([("inner.zip", inner), ("x", b"1")]), folder) == {"inner.zip": inner, "x": b"1"}


@pytest.mark.parametrize(
    ("content", "code"),
    [
        (b"", "archive_unknown"),
        (b"hello", "archive_unknown"),
        (b"\x1f\x8b", "archive_broken"),
        (b"PK\x03\x04", "archive_broken"),
        (gzip.compress(b"not a tar" * 100), "archive_broken"),
        (make_zip([("x", b"1" * 1000)])[:-30], "archive_broken"),
        (make_tar([("x", b"1" * 100_000)])[:50_000], "archive_broken"),
        (make_tar([("x", random.Random(0).randbytes(100_000))], "w:gz")[:50_000], "archive_broken"),
    ],
)
def test_damaged_archives_are_refused(content: bytes, code: str, folder: Path) -> None:
    assert refuse(content, folder).code == code


names = st.one_of(
    st.text(max_size=12),
    st.lists(st.sampled_from(["..", ".", "", "a", "b", "x" * 250, "c:", "\0", "\\", "é"]), min_size=1, max_size=6).map(
        "/".join
    ),
)
hostile_members = st.lists(st.tuples(names, st.binary(max_size=64)), max_size=5)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(members=hostile_members, kind=st.sampled_from(list(MAKERS)))
@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_hostile_names_stay_inside(members: Members, kind: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("hostile")
    (outside / "in").mkdir()
    try:
        packed = MAKERS[kind](members)
    except ValueError:
        return
    try:
        files = unpack(packed, outside / "in")
        assert set(files.values()) <= {content for _, content in members}
    except AdapterError:
        pass
    assert [path.name for path in outside.iterdir()] == ["in"]
    assert not any(path.is_symlink() for path in (outside / "in").rglob("*"))


@settings(max_examples=300, deadline=None)
@given(data=st.data(), kind=st.sampled_from(list(MAKERS)))
def test_mutated_archives_raise_only_our_errors(
    data: st.DataObject, kind: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    packed = bytearray(MAKERS[kind]([("adapter_config.json", b"{}" * 300), ("a/b" * 40, b"1" * 600)]))
    for _ in range(data.draw(st.integers(1, 8))):
        packed[data.draw(st.integers(0, len(packed) - 1))] = data.draw(st.integers(0, 255))
    outside = tmp_path_factory.mktemp("mutated")
    (outside / "in").mkdir()
    try:
        unpack(bytes(packed), outside / "in", max_bytes=MIB)
    except AdapterError as error:
        assert error.code  # noqa: PT017
    assert [path.name for path in outside.iterdir()] == ["in"]


def test_files_follow_the_same_rules(folder: Path) -> None:
    write_files([("dir/a", io.BytesIO(b"1")), ("dir/b", io.BytesIO(b"2"))], folder, max_bytes=MIB)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {"a": b"1", "b": b"2"}

    with pytest.raises(InvalidAdapter):
        write_files([("../x", io.BytesIO(b"1"))], folder, max_bytes=MIB)
    with pytest.raises(InvalidAdapter):
        write_files([("x", io.BytesIO(b"1")), ("x", io.BytesIO(b"1"))], folder, max_bytes=MIB)
    with pytest.raises(AdapterTooLarge):
        write_files([("big", io.BytesIO(bytes(3 * MIB)))], folder, max_bytes=MIB)
    with pytest.raises(AdapterTooLarge):
        write_files(((f"f{i}", io.BytesIO()) for i in range(9)), folder, max_bytes=MIB, max_files=8)

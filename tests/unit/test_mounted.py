"""What a bind of a path shows in a mount table: device, and the path in its own file system."""

from pathlib import Path

import pytest

from worker.mounted import mount_lines, where

TABLE = b"""\
20 1 254:0 / / rw,relatime - ext4 /dev/vda rw
21 20 0:30 /@srv /srv rw - btrfs /dev/vdb rw
22 20 254:0 /var/data /srv/bound rw shared:1 - ext4 /dev/vda rw
23 20 0:40 / /srv/a\\040b rw - tmpfs none rw
24 23 0:41 / /srv/a\\040b rw - tmpfs none rw
"""


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/home/x", ("254:0", "/home/x")),
        ("/srv/data", ("0:30", "/@srv/data")),  # a subvolume's name is part of it
        ("/srv/bound/x", ("254:0", "/var/data/x")),
        ("/srv/bounds", ("0:30", "/@srv/bounds")),
        ("/srv/a b/x", ("0:41", "/x")),  # of two mounts on one place the later is seen
    ],
)
def test_where_a_path_lies(tmp_path, path, expected):
    table = tmp_path / "mountinfo"
    table.write_bytes(TABLE)
    assert where(path, list(mount_lines(table))) == expected


def test_our_own_table_can_be_read():
    assert "/" in {str(one.point) for one in mount_lines(Path("/proc/self/mountinfo"))}

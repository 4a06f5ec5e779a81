"""First use of a fresh clone: no network and then one, Ctrl-C everywhere, a full disk, a folder that cannot be written, sudo."""

import os
import pwd
import re
import shutil
import sys
import time
import unittest
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))

from newcomer import Newcomer, may_mount  # noqa: E402

from firstlight.problems import Exit  # noqa: E402


class Session(unittest.TestCase):
    def setUp(self):
        self.machine = Newcomer()
        self.addCleanup(self.machine.close)
        self.run_ = self.machine.run

    def expect(self, code, done):
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        self.assertNotIn("Traceback", done.stderr)
        return done

    def good(self, *words, **options):
        done = self.expect(Exit.SUCCESS, self.run_(*(words or ("run",)), **options))
        return done

    def refused(self, code, *words, **options):
        """The output of a script that refused: one line of its own at the end, with the cause."""
        done = self.expect(code, self.run_(*(words or ("run",)), **options))
        last = done.stderr.strip().splitlines()[-1]
        self.assertTrue(last.startswith("scripts/"), done.stderr)
        return last

    @property
    def state(self):
        return self.machine.cache / "apt" / self.machine.distro.codename


class Offline(Session):
    """A failure is not recorded as a success."""

    def test_offline_and_then_online(self):
        self.machine.tell(offline="yes")
        for words in (("run",), ("setup", "--refresh")):
            said = self.refused(Exit.MISSING, *words)
            self.assertIn("package lists could not be fetched", said)
            self.assertIn("Temporary failure resolving", said)
            self.assertIn("run the same command again", said)
            self.assertFalse((self.state / "refreshed").exists())
        self.machine.tell(offline="")
        done = self.good()
        self.assertIn("verdict SUCCESS: booted", done.stderr)
        self.assertTrue((self.state / "refreshed").exists())
        # From here on there is nothing to fetch.
        self.machine.tell(offline="yes")
        self.good()

    def test_an_apt_that_says_nothing(self):
        """An apt without APT::Update::Error-Mode exits with 0: the existence of the lists is checked."""
        self.machine.tell(offline="yes", old_apt="yes")
        self.assertIn("package lists could not be fetched", self.refused(Exit.MISSING))
        self.assertFalse((self.state / "refreshed").exists())

    def test_refresh_fetches_although_it_was_done_within_a_day(self):
        self.good("setup")
        before = (self.machine.cache / "lab/current-10").resolve()
        self.machine.tell(version="2.0")
        self.assertIn("unpacking", self.good("setup", "--refresh").stderr)
        self.assertNotEqual((self.machine.cache / "lab/current-10").resolve(), before)
        # A refresh that is not possible is reported, and the existing files are used.
        self.machine.tell(offline="yes")
        self.refused(Exit.MISSING, "setup", "--refresh")
        self.good()

    def test_lists_of_yesterday_are_used_where_there_are_no_others(self):
        self.good("setup")
        old = time.time() - 2 * 24 * 3600
        shutil.rmtree(self.machine.cache / "lab")
        for age in (old, time.time() + 24 * 3600):  # a time stamp in the future does not count as recent
            os.utime(self.state / "refreshed", (age, age)) if (self.state / "refreshed").exists() else None
            self.machine.tell(offline="yes")
            shutil.rmtree(self.machine.cache / "lab", ignore_errors=True)
            self.assertIn("could not be renewed", self.good("setup").stderr)
            self.assertFalse((self.state / "refreshed").exists())

    def test_lists_that_are_gone_are_fetched(self):
        self.good("setup")
        shutil.rmtree(self.state / "lists")
        shutil.rmtree(self.machine.cache / "lab")
        self.good("setup")


class Leftovers(Session):
    """Files that are incomplete, truncated, damaged, or from another version are created again."""

    def test_archives(self):
        self.good("setup")
        archives = sorted((self.state / "archives").glob("*.deb"))
        self.assertGreater(len(archives), 5)
        archives[0].write_text(archives[0].read_text()[:40])
        archives[1].write_text(archives[1].read_text().replace("1", "2"))
        (self.state / "archives/fetching-x").mkdir()
        shutil.rmtree(self.machine.cache / "lab")
        self.machine.tell(log="")
        self.good("setup")
        (fetched,) = re.findall(r"^apt-get .* download (.*)$", self.machine.log, re.M)
        self.assertEqual(sorted(word.partition("=")[0] for word in fetched.split()), sorted(path.name.partition("_")[0] for path in archives[:2]))
        self.assertEqual(list((self.state / "archives").glob("fetching-*")), [])

    def test_lab(self):
        self.good("setup")
        top = self.machine.cache / "lab"
        for harm in (
            lambda root: (root / "vmlinuz").write_text("k"),
            lambda root: (root / "tree/bin/busybox").unlink(),
            lambda root: (root / "manifest.json").write_text('{"layout"'),
            lambda root: (root / "manifest.json").write_text("[]"),
            lambda root: (root / "manifest.json").unlink(),
            lambda root: shutil.rmtree(root),
            lambda root: (top / "current-10").unlink(),
        ):
            root = (top / "current-10").resolve()
            (top / "assembling-left").mkdir()
            harm(root)
            self.good("setup")
            self.assertEqual((root / "vmlinuz").read_text(), "kernel")
            self.assertFalse((top / "assembling-left").exists())

    def test_another_layout_keeps_its_own_lab(self):
        top = self.machine.cache / "lab"
        (top / "old").mkdir(parents=True)
        (top / "current").symlink_to("old")
        self.machine.own(top)
        self.good("setup")
        self.assertEqual(os.readlink(top / "current"), "old")

    def test_dry_run_after_one_that_failed(self):
        words = ("run", "--platform", "kvm", "--lab", "always", "--dry-run")
        self.good(*words)
        tree = self.machine.checkout / "build/runs/run/tree/jobs"
        tree.mkdir(parents=True)
        self.machine.own(tree.parent)
        self.assertIn("-accel kvm", self.good(*words).stdout)
        self.good(*words)

    def test_configuration(self):
        self.good()
        self.assertNotIn("--fresh", self.machine.log)
        self.assertEqual(self.machine.interrupted("configuring", "run")[0], Exit.INTERRUPTED)
        self.good()
        self.assertIn("cmake --preset kernel --fresh", self.machine.log)
        self.machine.tell(log="")
        moved = self.machine.checkout.rename(self.machine.root / "moved")
        self.machine.checkout = moved
        self.good()
        self.assertIn("cmake --preset kernel --fresh", self.machine.log)
        self.machine.tell(log="")
        self.good()
        self.assertNotIn("--fresh", self.machine.log)


class CtrlC(Session):
    STAGES = ("lists", "packages", "unpacking", "configuring", "building")

    def test_at_every_stage(self):
        for stage in self.STAGES:
            for times in (1, 3):
                code, said = self.machine.interrupted(stage, "run", times=times)
                self.assertEqual((code, said.strip().splitlines()[-1]), (Exit.INTERRUPTED, "scripts/run: interrupted"), f"{stage}: {said}")
                self.assertEqual(self.machine.left(), [], stage)
        code, said = self.machine.interrupted("boot", "run", "--cmdline", "job=idle", times=2)
        self.assertEqual((code, said.strip().splitlines()[-1]), (Exit.INTERRUPTED, "scripts/run: interrupted"), said)
        self.assertEqual(self.machine.left(), [])
        self.assertIn("verdict SUCCESS: booted", self.good().stderr)


class Outcome(Session):
    def test_no_guest_a_time_out_and_hidden_lines(self):
        said = self.refused_by_machine("run", "--memory", "1000000")
        self.assertEqual(said, "the virtual machine did not start: qemu-system-x86_64: cannot set up guest memory 'pc.ram': Cannot allocate memory")
        done = self.expect(Exit.TIMEOUT, self.run_("run", "--cmdline", "job=idle", "--timeout", "0.5"))
        self.assertEqual(done.stderr.strip().splitlines()[-1], "time-out: the guest gave no verdict within 0.5 s")
        self.assertNotIn("@", self.good().stdout)
        shown = self.good("run", "--records").stdout
        self.assertIn("@@host ", shown)
        self.assertIn("@{", shown)

    def refused_by_machine(self, *words):
        return self.expect(Exit.NOT_STARTED, self.run_(*words)).stderr.strip().splitlines()[-1]


class Places(Session):
    def test_a_link_to_a_script(self):
        folder = self.machine.root / "elsewhere"
        folder.mkdir()
        (folder / "fl").symlink_to(self.machine.checkout / "scripts/run")
        (folder / "again").symlink_to("fl")
        for name in ("fl", "again"):
            self.assertIn("usage: scripts/run", self.good(str(folder / name), "--help").stdout)

    def test_folder_of_the_cache(self):
        said = self.refused(Exit.USAGE, "run", FIRSTLIGHT_CACHE="some/where")
        self.assertIn("an absolute path was expected", said)
        self.good("setup", FIRSTLIGHT_CACHE="", XDG_CACHE_HOME="some/where")  # is ignored, as its specification requires
        self.assertTrue((self.machine.home / ".cache/firstlight/lab/current-10").exists())
        self.assertFalse((self.machine.root / "some").exists())

    @unittest.skipUnless(os.geteuid() == 0, "only root can make a folder that belongs to another one")
    def test_a_cache_and_a_checkout_of_root(self):
        os.chown(self.machine.cache, 0, 0)
        said = self.refused(Exit.ERROR)
        for part in ("permission denied", "belongs to root", "chown", "FIRSTLIGHT_CACHE"):
            self.assertIn(part, said)
        self.machine.own(self.machine.cache)
        os.chown(self.machine.checkout, 0, 0)
        said = self.refused(Exit.ERROR)
        for part in (str(self.machine.checkout / "build"), "belongs to root", "--no-build"):
            self.assertIn(part, said)

    @unittest.skipUnless(may_mount(), "needs a mount namespace")
    def test_a_file_system_that_is_read_only(self):
        for folder, part in ((self.machine.cache, "FIRSTLIGHT_CACHE"), (self.machine.checkout, "--no-build")):
            said = self.refused(Exit.ERROR, before=f"mount --bind {folder} {folder} && mount -o remount,bind,ro {folder}")
            self.assertIn("file system is read-only", said)
            self.assertIn(part, said)


@unittest.skipUnless(may_mount(), "needs a mount namespace")
class FullDisk(Session):
    def mount(self, size):
        return f"mount -t tmpfs -o size={size},mode=777 none {self.machine.cache}"

    def test_too_little_is_said_before_anything_is_fetched(self):
        said = self.refused(Exit.ERROR, before=self.mount("4m"))
        self.assertRegex(said, rf"about 700 MiB are needed in {self.machine.cache}/lab, 4 MiB are free.*FIRSTLIGHT_CACHE")
        self.assertNotIn("apt-get", self.machine.log)

    def test_half_way_it_is_one_line(self):
        module = self.machine.checkout / "scripts/firstlight/lab.py"
        module.write_text(module.read_text().replace("ROOM = 700 << 20", "ROOM = 0"))
        self.machine.tell(package_bytes=str(3 << 20))
        # In one namespace: first full, then with free space.
        before = self.mount("12m")
        done = self.expect(Exit.ERROR, self.run_("run", before=before))
        own = [line for line in done.stderr.splitlines() if not line.startswith("lab: ")]
        self.assertEqual(len(own), 1, done.stderr)
        self.assertRegex(own[0], rf"no space left on the disk. Free [01] MiB in {self.machine.cache}.* FIRSTLIGHT_CACHE")
        again = f"{self.mount('12m')} && {{ {' '.join(self.machine.command('setup'))} 2>/dev/null; mount -o remount,size=200m {self.machine.cache}; }}"
        self.good("run", before=again)


@unittest.skipUnless(os.geteuid() == 0, "only root can be called by sudo")
class Sudo(Session):
    def test_what_goes_into_a_home_goes_into_that_of_who_asked(self):
        user = pwd.getpwnam("nobody")
        self.machine.tell(missing="mtools")
        self.assertIn(f"sudo {self.machine.checkout}/scripts/setup", self.expect(Exit.MISSING, self.run_("run")).stderr)
        roots = self.machine.root / "root"
        roots.mkdir()
        done = self.good("setup", root=True, HOME=str(roots), SUDO_UID=str(user.pw_uid), SUDO_GID=str(user.pw_gid), SUDO_USER="nobody")
        self.assertIn("installing:", done.stderr)
        self.assertEqual(list(roots.rglob("*")), [])
        for path in self.machine.cache.rglob("*"):
            self.assertEqual(path.lstat().st_uid, user.pw_uid, path)
        (install,) = re.findall(r"^apt-get .* install .*$", self.machine.log, re.M)
        self.assertIn("APT::Keep-Downloaded-Packages=false", install)
        self.assertIn("Dir::Cache=/var/cache/apt", install)
        # And the user fetches nothing again.
        self.machine.tell(offline="yes")
        self.good()


if __name__ == "__main__":
    unittest.main()

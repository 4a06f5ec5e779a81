"""What the VM tests do to QEMU while its guest runs: QMP commands and a sudden end; disks with the loader; images in QEMU's own format."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from firstlight import actions, esp, launch, machine, nested, qcow2, verify_image, vmtests  # noqa: E402
from firstlight.actions import Action  # noqa: E402
from firstlight.problems import Problem  # noqa: E402


class FakeQemu:
    """The QMP end of a QEMU: notes the commands, and answers each, with an event before it."""

    def __init__(self, folder, refuse=""):
        self.refuse = refuse
        self.seen = []
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.bind(str(folder / actions.SOCKET))
        self.socket.listen(1)
        self.thread = threading.Thread(target=self.serve, daemon=True)
        self.thread.start()

    def serve(self):
        connection, _ = self.socket.accept()
        with connection, connection.makefile("rw") as file:
            print(json.dumps({"QMP": {"version": {}, "capabilities": []}}), file=file, flush=True)
            for line in file:
                command = json.loads(line)
                self.seen.append(command)
                print(json.dumps({"event": "DEVICE_DELETED"}), file=file)
                refused = command["execute"] == self.refuse
                print(json.dumps({"error": {"class": "GenericError", "desc": "no such device"}} if refused else {"return": {}}), file=file, flush=True)

    def close(self):
        self.socket.close()


class Carried(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))

    def until_done(self, doing, verdict=False):
        for _ in range(200):
            left = doing.step(verdict)
            if left is None:
                return
            time.sleep(min(left, 0.05))
        self.fail("never done")

    def test_commands_in_order_each_after_its_line(self):
        qemu = FakeQemu(self.folder)
        add, remove = ({"execute": f"device_{verb}", "arguments": {"id": "x"}} for verb in ("add", "del"))
        doing = actions.Actions([Action("begin", qmp=[add]), Action("added", delay=0.05, qmp=[remove])], 0, self.folder)
        doing.line("nothing")
        self.assertIsNone(doing.step(False))
        self.assertEqual(qemu.seen, [])
        doing.line("added")  # not its turn yet
        doing.line("it begins")
        self.until_done(doing)
        self.assertEqual((doing.done, doing.fault), (1, ""))
        doing.line("disk added")
        self.assertGreater(doing.step(False), 0)
        self.until_done(doing)
        doing.close()
        self.assertEqual(qemu.seen, [{"execute": "qmp_capabilities"}, add, remove])
        self.assertEqual((doing.done, doing.fault), (2, ""))
        qemu.close()

    def test_what_counts_is_before_the_verdict(self):
        qemu = FakeQemu(self.folder)
        doing = actions.Actions([Action("x", qmp=[{"execute": "stop"}])], 0, self.folder)
        doing.line("x")
        self.until_done(doing, verdict=True)
        doing.close()
        self.assertEqual(doing.done, 0)
        qemu.close()

    def test_a_refused_command_and_no_socket(self):
        for refuse, said in (("device_add", "device_add after 'x': device_add: no such device"), (None, "No such file")):
            qemu = FakeQemu(self.folder, refuse) if refuse else None
            doing = actions.Actions([Action("x", qmp=[{"execute": "device_add"}])], 0, self.folder)
            doing.line("x")
            self.until_done(doing)
            doing.close()
            self.assertEqual(doing.done, 0)
            self.assertIn(said, doing.fault)
            if qemu:
                qemu.close()
                (self.folder / actions.SOCKET).unlink()

    def test_a_kill_ends_the_machine_at_once(self):
        job = nested.Job("m", [], timeout=20, actions=[Action("two", kill=True)])
        outcome = launch.watch([sys.executable, "-c", "import time\nfor n in ('one', 'two'): print(n, flush=True)\ntime.sleep(20)"], job, None, self.folder)
        self.assertEqual((outcome.status, outcome.actions, outcome.output, outcome.timed_out), (-signal.SIGKILL, 1, "one\ntwo", False))
        self.assertLess(outcome.seconds, 10)

    def test_only_a_machine_with_commands_has_a_socket(self):
        wanted = [Action("x", qmp=[{"execute": "stop"}])]
        words = machine.Machine("m", disks=["virtio:1m"], actions=wanted).job(self.folder).arguments
        self.assertIn("unix:{folder}/qmp.sock,server=on,wait=off", words)
        for others in ([Action("x", kill=True)], []):
            self.assertNotIn("-qmp", machine.Machine("m", disks=["virtio:1m"], actions=others).job(self.folder).arguments)
        with self.assertRaises(Problem):
            machine.Machine("m", "kvm", actions=wanted)
        job = nested.Job("m", ["-append", "{folder}"], actions=wanted)
        self.assertEqual(launch.command_here(None, job, Path("/f")), ["-append", "/f"])
        job.actions = []
        self.assertEqual(launch.command_here(None, job, Path("/f")), ["-append", "{folder}"])

    def test_mistakes(self):
        for words in (
            {"after": "(", "kill": True}, {"after": "x"}, {"after": "x", "kill": True, "qmp": [{"execute": "stop"}]}, {"after": "x", "qmp": [{"run": "stop"}]}, {"after": "x", "qmp": ["stop"]},
            {"after": "x", "kill": True, "delay": -1}, {"after": 5, "kill": True},
        ):  # fmt: skip
            with self.assertRaises(Problem, msg=str(words)):
                Action(**words)

    def test_an_action_that_was_not_carried_out_fails(self):
        case = vmtests.Case("a", actions=[Action("x", qmp=[{"execute": "stop"}])])
        said = '@{"record":"verdict","verdict":"SUCCESS","reason":""}'
        for outcome, passed in ((nested.Outcome(33, said, actions=1), True), (nested.Outcome(33, said), False), (nested.Outcome(33, said, actions=1, fault="stop: refused"), False)):
            result = vmtests.judge(case, launch.finished(case.to_machine(self.folder), outcome))
            self.assertEqual(result.status, "passed" if passed else "failed", result.detail)
        self.assertIn("stop: refused", result.detail)


def write_qcow2(image, blocks):
    """Clusters of an image as QEMU leaves them: data, a second table, and its place in the first one."""
    with open(image, "r+b") as file:
        table = bytearray(qcow2.CLUSTER)
        for number, (cluster, data) in enumerate(blocks.items()):
            at = (5 + number) * qcow2.CLUSTER
            file.seek(at)
            file.write(data)
            struct.pack_into(">Q", table, 8 * cluster, at | 1 << 63)
        file.seek(4 * qcow2.CLUSTER)
        file.write(table)
        file.seek(3 * qcow2.CLUSTER)
        file.write(struct.pack(">Q", 4 * qcow2.CLUSTER | 1 << 63))


class Images(unittest.TestCase):
    def setUp(self):
        self.folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        self.image = self.folder / "a.img"

    def test_an_empty_image_and_one_that_was_written(self):
        qcow2.make(self.image, 3 * qcow2.CLUSTER - 512)
        self.assertEqual(qcow2.read(self.image), bytes(3 * qcow2.CLUSTER - 512))
        write_qcow2(self.image, {2: b"c" * 512, 0: b"a" * qcow2.CLUSTER})
        found = qcow2.read(self.image)
        self.assertEqual((len(found), found[:1], found[qcow2.CLUSTER], found[2 * qcow2.CLUSTER :][:513]), (3 * qcow2.CLUSTER - 512, b"a", 0, b"c" * 512 + b"\0"))
        self.image.write_bytes(b"raw")
        with self.assertRaises(ValueError):
            qcow2.read(self.image)
        with self.assertRaises(ValueError):
            qcow2.make(self.image, 1 << 50)

    def test_a_qcow2_disk(self):
        disk = nested.Disk("d.img", 1 << 20, "qcow2")
        self.assertEqual(len(qcow2.read(launch.make_disk(disk, self.folder))), 1 << 20)
        words = " ".join(machine.Machine("m", disks=["nvme:1m,content=qcow2"]).drives()[1])
        self.assertIn("format=qcow2,file={disk:nvme0n1.img}", words)
        with self.assertRaises(Problem):
            machine.Machine("m", "kvm", disks=["nvme:1m,content=qcow2"])

    def durable(self, blocks, output, **more):
        case = vmtests.Case(
            "a", cmdline="job=verify disk=vda scratch=vda bs=4k seed=5", disks=[f"virtio:{64 << 10}"], durable=["vda"], expect="NO_VERDICT", actions=[Action("x", kill=True)], **more
        )  # fmt: skip
        boot = launch.finished(case.to_machine(self.folder), nested.Outcome(-9, output, actions=1))
        boot.machine.specs[0].bring_out.write_bytes(blocks)
        with mock.patch.object(verify_image, "crc32c", return_value=lambda data: sum(data)):
            return vmtests.judge(case, boot)

    def test_flushed_blocks_are_demanded(self):
        def block(number):
            head = verify_image.HEADER.pack(verify_image.MAGIC, number * 8, 1, 5, 0, 4096)
            data = head.ljust(4096, b"x")
            return data[:32] + struct.pack("<I", sum(data)) + data[36:]

        said = 'Firstlight, entered by pvh\n[ 1.0] vda: 16 blocks written and flushed\n'
        good = b"".join(block(number) for number in range(16))
        self.assertEqual(self.durable(good, said).status, "passed")
        lost = self.durable(good[:-4096] + bytes(4096), said)
        self.assertEqual(lost.status, "failed")
        self.assertIn("vda: 1 of 16 flushed blocks were lost, first: LBA 120", lost.detail)
        for output in ("Firstlight, entered by pvh\n", said + said, said.replace("16 blocks", "15 blocks"), said.replace("vda", "sda")):
            self.assertEqual(self.durable(good, output).status, "failed", output)

    def test_a_row_that_is_not_killed_is_not_durable(self):
        for row in ('durable = ["vda"]', 'durable = ["vda"]\nactions = [{after = "x", kill = true}]', 'durable = ["vdb"]\nexpect = "NO_VERDICT"\nactions = [{after = "x", kill = true}]'):
            (self.folder / "t.toml").write_text(f'[[test]]\nname = "a"\ndisks = ["virtio:1m"]\n{row}\n')
            with self.assertRaises(Problem, msg=row):
                vmtests.load(self.folder)

    def test_a_disk_with_the_loader(self):
        efi = self.folder / "BOOTX64.EFI"
        efi.write_bytes(b"MZ" + b"loader" * 1000)
        made = esp.make_disk(self.image, 16 << 20, efi, "job=boot")
        data = made.read_bytes()
        self.assertEqual((len(data), data[510:512], data[450]), (16 << 20, b"\x55\xaa", esp.EFI_SYSTEM))
        first, sectors = struct.unpack_from("<II", data, 454)
        self.assertEqual((first, first + sectors), (esp.FIRST_SECTOR, (16 << 20) // 512))
        self.assertEqual(data[first * 512 + 510 :][:2], b"\x55\xaa")
        said = subprocess.run(["mtype", "-i", f"{made}@@{first * 512}", "::/firstlight/cmdline.txt"], capture_output=True, text=True, env=dict(os.environ, MTOOLS_SKIP_CHECK="1"))
        self.assertEqual(said.stdout, "job=boot\n")

    def test_the_loaders_disk_is_the_only_one_for_the_firmware(self):
        with mock.patch.object(machine.esp, "make_disk", side_effect=lambda image, *rest: image), mock.patch.object(machine.esp, "make", side_effect=lambda image, *rest: image):
            own = machine.Machine("m", "qemu-uefi", "q35", disks=["nvme:16m,content=loader"], efi=Path("/nowhere")).job(self.folder)
            other = machine.Machine("m", "qemu-uefi", "q35", disks=["nvme:16m"], efi=Path("/nowhere")).job(self.folder)
        self.assertNotIn("usb-storage,drive=esp", own.arguments)
        self.assertIn("usb-storage,drive=esp", other.arguments)
        self.assertEqual([disk.content for disk in own.disks], [str(self.folder / "m-loader.img")])
        for platform, disks in (("qemu-pvh", ["nvme:16m,content=loader"]), ("qemu-uefi", ["nvme:1m,content=loader"]), ("qemu-uefi", ["nvme:16m,content=loader", "virtio:16m,content=loader"]), ("qemu-uefi", ["nvme:16m,content=loader,sector=4096"])):
            with self.assertRaises(Problem, msg=str(disks)):
                machine.Machine("m", platform, disks=disks)

    def test_qemus_defaults(self):
        job = machine.Machine("m", disks=["virtio:1m"], plain=True).job(self.folder)
        self.assertEqual(job.arguments, ["-global", "e1000.romfile=", "-kernel", "{file:firstlight.elf}", "-nographic", "-drive", "file={disk:vda.img},format=raw,if=virtio"])
        job = machine.Machine("m", machine="microvm", cmdline="job=boot", disks=["virtio:1m"], plain=True).job(self.folder)
        self.assertEqual(job.arguments[:2] + job.arguments[-2:], ["-M", "microvm", "-device", "virtio-blk-device,drive=vda"])
        for more in ({"machine": "q35"}, {"platform": "kvm"}, {"disks": ["nvme:1m"]}, {"counted": True}):
            with self.assertRaises(Problem, msg=str(more)):
                machine.Machine(**{"name": "m", "disks": ["virtio:1m"], "plain": True, **more})


if __name__ == "__main__":
    unittest.main()

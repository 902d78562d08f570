"""A session of a stock QMP client: qemu.qmp from PyPI, as QEMU's own tools use it.

The machine is started by tests/qmp_python.rs, which tells where its sockets are:
TARDIGRADE_QMP and TARDIGRADE_SERIAL. It has one disk, `disk0`, and runs the test guest.
"""

import asyncio
import os
import socket
import unittest

from qemu.qmp import ExecuteError, QMPClient

PATIENCE = 120
SUCCESS = ["created", "running", "waiting", "pending", "concluded"]
FAILURE = ["created", "running", "aborting", "concluded"]


class Guest:
    """The guest's agent, asked over the serial port."""

    def __init__(self):
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(os.environ["TARDIGRADE_SERIAL"])
        self.lines = self.socket.makefile("rw", newline="\n")
        self.asked = 0

    def ask(self, request):
        self.asked += 1
        token = f"py{self.asked}"
        self.lines.write(f"{token} {request}\n")
        self.lines.flush()
        for line in self.lines:
            words = line.strip().split(" ", 2)
            if words[0] == token:
                if words[1] != "ok":
                    raise AssertionError(f"the guest answers to '{request}': {line}")
                return words[2] if len(words) > 2 else ""
        raise AssertionError("the guest is gone")

    def close(self):
        self.lines.close()
        self.socket.close()


class Session(unittest.IsolatedAsyncioTestCase):
    async def asyncSetUp(self):
        self.qmp = QMPClient("test")
        await self.qmp.connect(os.environ["TARDIGRADE_QMP"])

    async def asyncTearDown(self):
        await self.qmp.disconnect()

    async def execute(self, command, **arguments):
        arguments = {name.replace("_", "-"): value for name, value in arguments.items()}
        return await asyncio.wait_for(self.qmp.execute(command, arguments), PATIENCE)

    async def run_job(self, command, **arguments):
        """Runs a job to its end. Gives what happened, in order, and the job's entry."""
        story = []

        async def listen(listener):
            async for event in listener:
                if event["event"] != "JOB_STATUS_CHANGE":
                    story.append(event["event"])
                elif event["data"]["id"] == "job":
                    story.append(event["data"]["status"])
                    if story[-1] == "concluded":
                        return

        with self.qmp.listener() as listener:
            await self.execute(command, job_id="job", **arguments)
            await asyncio.wait_for(listen(listener), PATIENCE)
        entry, = [job for job in await self.execute("query-jobs") if job["id"] == "job"]
        await self.execute("job-dismiss", id="job")
        self.assertEqual(await self.execute("query-jobs"), [])
        return story, entry

    async def snapshots(self):
        """The snapshots of disk0, as query-block tells them."""
        block, = await self.execute("query-block")
        return block["inserted"]["image"].get("snapshots", [])

    async def test_a_guest_is_saved_changed_loaded_and_its_checkpoint_deleted(self):
        target = {"tag": "stock", "vmstate": "disk0", "devices": ["disk0"]}
        before = [snapshot["name"] for snapshot in await self.snapshots()]
        guest = Guest()
        guest.ask("dirty 1 41")
        guest.ask("pattern vda 8M 64K 41")
        story, entry = await self.run_job("snapshot-save", **target)
        self.assertEqual(story, ["created", "running", "STOP", "RESUME"] + SUCCESS[2:])
        self.assertEqual((entry["type"], entry["status"]), ("snapshot-save", "concluded"))
        self.assertNotIn("error", entry)
        self.assertEqual(entry["current-progress"], entry["total-progress"])

        saved = (await self.snapshots())[-1]
        self.assertEqual(saved["name"], "stock")
        self.assertGreater(saved["vm-state-size"], 64 << 20)
        self.assertEqual([node["name"] for node in await self.snapshots()], before + ["stock"])
        nodes = await self.execute("query-named-block-nodes", flat=True)
        disk, = [node for node in nodes if node["node-name"] == "disk0"]
        self.assertEqual((disk["drv"], disk["ro"]), ("qcow2", False))
        self.assertEqual(disk["image"]["snapshots"][-1], saved)

        guest.ask("dirty 1 42")
        guest.ask("pattern vda 8M 64K 42")
        story, entry = await self.run_job("snapshot-load", **target)
        self.assertEqual(story, ["created", "running", "STOP", "RESUME"] + SUCCESS[2:])
        self.assertEqual(entry["type"], "snapshot-load")
        self.assertIn("seed=41", guest.ask("check-memory"))
        guest.ask("verify vda 8M 64K 41")
        guest.close()

        # As QEMU: what is deleted is gone, and to delete it again is no error.
        for _ in range(2):
            story, entry = await self.run_job("snapshot-delete", tag="stock", devices=["disk0"])
            self.assertEqual(story, SUCCESS)
            self.assertNotIn("error", entry)
            self.assertEqual([node["name"] for node in await self.snapshots()], before)

    async def test_jobs_that_cannot_work_tell_why_and_leave_the_guest_running(self):
        cases = [
            ("snapshot-load", "none", "disk0", ["disk0"],
             "Snapshot 'none' does not exist in one or more devices"),
            ("snapshot-save", "booted", "disk0", ["disk0"],
             "Snapshot 'booted' already exists in one or more devices"),
            ("snapshot-save", "new", "disk0", [], "At least one device is required for snapshot"),
            ("snapshot-save", "new", "nodisk", ["disk0"],
             "vmstate block device 'nodisk' does not exist"),
            ("snapshot-save", "new", "disk0", ["disk0", "nodisk"],
             "No block device node 'nodisk'"),
        ]
        for command, tag, vmstate, devices, error in cases:
            with self.subTest(error=error):
                story, entry = await self.run_job(
                    command, tag=tag, vmstate=vmstate, devices=devices)
                self.assertEqual(story, FAILURE)
                # Some of QEMU's texts are told with the name of the node after them.
                self.assertIn(entry["error"], [error, f"{error}: 'disk0'"])
        status = await self.execute("query-status")
        self.assertEqual(status, {"status": "running", "running": True})

    async def refused(self, error_class, text, command, **arguments):
        with self.assertRaises(ExecuteError) as refusal:
            await self.execute(command, **arguments)
        error = refusal.exception
        self.assertEqual((error.error_class, str(error)), (error_class, text))

    async def test_commands_that_cannot_be_done_are_refused(self):
        await self.refused("CommandNotFound", "The command no-such has not been found", "no-such")
        await self.refused("GenericError", "Job not found", "job-dismiss", id="none")
        await self.refused("GenericError", "Parameter 'tag' is missing", "snapshot-delete",
                           job_id="j", devices=["disk0"])
        await self.refused("GenericError", "Parameter 'more' is unexpected", "stop", more=1)
        await self.refused("GenericError", "Invalid job ID '1'", "snapshot-delete",
                           job_id="1", tag="t", devices=["disk0"])
        await self.refused(
            "GenericError", "Invalid parameter type for 'devices', expected: array",
            "snapshot-delete", job_id="j", tag="t", devices="disk0")

    async def test_stop_and_cont_are_told_once(self):
        with self.qmp.listener() as listener:
            for command in ["stop", "stop", "cont", "cont"]:
                self.assertEqual(await self.execute(command), {})
            events = [(await listener.get())["event"] for _ in range(2)]
            self.assertEqual(events, ["STOP", "RESUME"])
            self.assertTrue(listener.empty())

    async def test_what_is_asked_is_answered(self):
        self.assertEqual(await self.execute("query-kvm"), {"enabled": True, "present": True})
        version = await self.execute("query-version")
        self.assertEqual(sorted(version["qemu"]), ["major", "micro", "minor"])
        cpus = await self.execute("query-cpus-fast")
        self.assertEqual([cpu["cpu-index"] for cpu in cpus], list(range(len(cpus))))
        commands = {command["name"] for command in await self.execute("query-commands")}
        self.assertLessEqual({"snapshot-save", "qmp_capabilities", "query-block"}, commands)


if __name__ == "__main__":
    unittest.main()

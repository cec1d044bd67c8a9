"""Command line of an echo engine."""

from pdctl.adapters import Assignment, Launch
from pdctl.topology.spec import Device, Topology


class EchoLauncher:
    """See Launcher."""

    extra_ports = ("bootstrap",)
    packages: tuple[str, ...] = ()

    def requirement(self, device: Device) -> str:
        """See Launcher.requirement."""
        return ""

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """See Launcher.launch."""
        ports = (assignment.ports["http"], assignment.ports["bootstrap"])
        argv = (assignment.python, "-m", "tests.adapters.echo.server", assignment.host, *map(str, ports))
        return Launch(argv, {}, ready_path="/health", generate_path="/v1/completions")


LAUNCHER = EchoLauncher()

"""Command line of an echo engine."""

from pdctl.adapters import Assignment, BaseLauncher, Launch
from pdctl.topology.spec import EngineGroup, Topology


class EchoLauncher(BaseLauncher):
    """See Launcher."""

    # The topologies of the tests set these for every kind; an echo engine has no use for them.
    settings = frozenset({"max_num_seqs", "kv_cache_gb"})

    def ports(self, group: EngineGroup) -> tuple[str, ...]:
        """See Launcher.ports."""
        return ("bootstrap",)

    def launch(self, topology: Topology, assignment: Assignment) -> Launch:
        """See Launcher.launch."""
        ports = (assignment.ports["http"], assignment.ports["bootstrap"])
        argv = (assignment.python, "-m", "tests.adapters.echo.server", assignment.host, *map(str, ports))
        return Launch(argv, {}, ready_path="/health", generate_path="/v1/completions")


LAUNCHER = EchoLauncher()

"""The command where no file can be larger than so many bytes, its first argument: as on a disk without room."""

LIMITED = (
    "import resource, signal, sys\n"
    "from ternbus.command import main\n"
    "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    "resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))\n"
    "main(sys.argv[2:])\n"
)

"""The signs by which a run and its supervisor understand each other."""

STOP_NAME = "STOP"  # a file of the run folder: save and end, please

# Exit codes. 16 and 17 are Megatron's, which the SIGMA stack keeps.
EXIT_SUSPECT = 16  # a wrong result that came again: go on with other hardware
EXIT_FAILED_VALIDATION = 17  # wrong there, too; or a machine that is not fit
EXIT_HUNG = 75  # EX_TEMPFAIL of sysexits.h: try again later


__all__ = ["EXIT_FAILED_VALIDATION", "EXIT_HUNG", "EXIT_SUSPECT", "STOP_NAME"]

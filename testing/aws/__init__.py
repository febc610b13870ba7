"""An AWS account for tests: an emulator, what it lacks, and the AWS CLI that talks to it."""

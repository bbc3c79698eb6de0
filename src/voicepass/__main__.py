"""`python -m voicepass` is `voicepass`."""

from voicepass.cli import main

main()

"""An emulated ElevenLabs for tests and the demo: the same frames and answers, without an account or a charge.

`create_emulator(Emulator(agents=[EmulatedAgent(agent_id="agent_demo")]))` is an ASGI app. It mints signed URLs, holds
the conversations that they open with an agent that takes orders, refuses as the live service does (`CLOSINGS` says how
sure we are of each row), and fails on demand (`Fault`). It imports nothing of voicepass.
"""

from elevenlabs_emulator.agents import EmulatedAgent
from elevenlabs_emulator.app import create_emulator
from elevenlabs_emulator.emulator import DEFAULT_WEBHOOK_SECRET, Emulator
from elevenlabs_emulator.failures import CLOSINGS, Fault

__all__ = ["CLOSINGS", "DEFAULT_WEBHOOK_SECRET", "EmulatedAgent", "Emulator", "Fault", "create_emulator"]

"""The parts of dispatch and combine: transports, the message, moves of rows, the choice among transports."""

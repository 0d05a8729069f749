"""The helper's state machine, and what a shell around it must do.

The core decides, the shell acts: it owns the clock, the disk, the connection and the random numbers. What the protocol
promises (docs/protocol.md, section 16) holds if the shell keeps this contract. `helper.shell.service` is one shell.

1. **One core.** Make one `Core` for a helper, from its `Profile`, from the `State` that the last `Save` wrote (for a
   new helper from `State.new`), and from the `Records` of all its saves. No other process uses the same state
   meanwhile, and none uses a copy of it: two copies forget each other's sets. Box keys are in the state alone.
2. **One event at a time.** Call `handle(event, now)` in one thread, first with `Started`. ``now`` is in seconds of a
   clock that never goes back; the time of day comes in `Started` and `TimeReached`. The core keeps no clock, no thread,
   and no randomness but the ``random`` of its profile.
3. **Actions in order.** Perform the actions that `handle` returns, all of them and in their order, before the next
   event. If one fails, perform none of those after it: end the process, and start again from the disk.
4. **Save.** Write the state and the step, if there is one, to stable storage in one transaction, before the next
   action: an answer that somebody has seen must not be forgotten. After it, `Records` must answer by it. A box key that
   is no longer in the state must not be readable on the disk any more.
5. **Time.** After each `handle`, ask `due_s`, and handle `TimeReached` when ``now`` has reached it, if nothing happens
   before. Too early does no harm; too late delays an answer.
6. **Connect.** Open a connection to the broker with a persistent session, QoS 1, and the given last will, retained.
   Answer with one `Connected` or one `ConnectFailed`, and end each `Connected` with one `Disconnected`. After
   `Disconnected` nothing of that connection may arrive any more.
7. **Subscribe, Publish.** Send them, in order, on the connection. Where there is none, drop them: the core learns of it
   by `Disconnected`, and repeats what matters. Handle `Refused` for a publication that the broker refuses.
8. **Frames.** Parse each payload with `frame.parse`, and handle `FrameArrived`, or `FrameMalformed` with the error's
   reason, in the order in which the broker sent them: what it has retained before what it was sent later. Ignore empty
   payloads. Acknowledge a message to the broker after the actions that it led to. Verify no signature: the core does.
9. **Note, Log.** Keep the facts and add to the counters, for `ternbus helper status`; print the log. What is lost of
   them changes nothing.
10. **Stop.** Flush what was published, disconnect so that the broker does not publish the last will, and end with the
    code. `StopRequested` asks for it. The core ignores every event after it.
"""

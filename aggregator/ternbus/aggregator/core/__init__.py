"""The aggregator as a state machine without I/O. What a shell must do to run it:

1. Recover. Make one ``Core`` from what was saved (``ternbus.aggregator.store.recovery``), and perform what
   ``start(now)`` returns before anything else. One core serves a directory at a time: the shell holds its lock.

2. Feed. Call ``handle(event, now)`` from one thread, with what happened in the order in which it happened. ``now`` is
   in seconds of a clock that never goes back; time of day comes in the events that need it. An event may be late, and a
   message may come twice. ``MessageArrived`` tells how long it has waited: while that is long, work is shared out. A
   message that the shell does not hand on must not be acknowledged to the broker; one of QoS 0 that it drops is told by
   ``MessagesDropped``.

3. Perform what each call returns, in order, in the order of the calls. A shell may choose another order that keeps
   this:

   a. A ``Save`` is durable before any action behind it is performed: a receipt, a version or a session number that
      anybody has seen survives a crash.
   b. Saves keep their order among themselves. They may move ahead of other actions, and the saves of several calls
      may share one commit: to publish later is always safe.
   c. Other actions keep their order among themselves: a delta is published before the head that names it.

4. Acknowledge a message to the broker only after every ``Save`` that its event led to is durable. A message that was
   not acknowledged comes again, and is answered as before.

5. Wake the core. When ``deadline`` has passed, call ``handle(TimeReached(), now)``; look at ``deadline`` again after
   every call. More calls than that do no harm. Merges, reconnects and counters wait for nothing else.

6. Connect when ``Connect`` asks for it, with its last will and in a persistent MQTT session, and tell how it went:
   ``Connected``, or ``ConnectFailed``; then ``Disconnected`` when the connection ends, each once. The core decides
   when to try again; a shell that retries by itself breaks the numbering of sessions. Tell ``Refused`` for
   each publication that the broker refuses, or that is too large for it, and ``Published`` for each acknowledged one
   whose topic is in ``awaited``; without them what the broker drops goes unnoticed, and snapshots come late.

7. Where an action fails, it depends on which. A ``Save`` that fails ends the process, and nothing behind it is
   performed: the next start goes on from the last commit. ``Publish``, ``RepublishRetained``, ``Subscribe`` and
   ``Unsubscribe`` without a connection are dropped: whatever matters is sent again, at the next connection or when a
   device asks again. ``RepublishRetained`` reads the frames as saved. A ``Log`` that fails changes nothing.

8. Stop. After ``StopRequested`` perform everything up to ``Stop``, disconnect, and hand the core no further event. A
   ``Stop`` with an ``error`` may come at any time: going on would do harm, and only the operator can mend it. A process
   that dies instead loses nothing that was saved.

9. What a command asks for (invitations, revocation, state, counts) is an event, too; its ``RequestDone`` tells the
   command that it is in force. All records of earlier calls must be saved before an event is made from the ledger.

10. Tell the core every few seconds how much of the disk is free (``DiskChecked``), at first before it connects: below
    5 % it accepts nothing. A shell without a disk tells nothing.
"""

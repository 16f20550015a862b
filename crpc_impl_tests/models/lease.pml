/* The lease of locks and elections (section impl-lease of crpc.h), as a model for spin.
 *
 * Contenders queue for one lock: each has an ephemeral node, and the one whose node stands first
 * may write its name into the lock's record. Explored is every order in which requests arrive, are
 * lost or late, sessions end, contenders pause and time passes. Claimed is that no two contenders
 * ever hold at a time: `grant` asserts it.
 *
 * What is left out, and why that loses nothing:
 *
 *   time      Whole ticks, which come at any moment: a pause is a series of ticks in which a process
 *             does nothing. The lease of the record is LEASE ticks. A contender's clock may be wrong
 *             by one tick in what it measures, so it holds for one less, and waits for one more.
 *             That is the rule's 1/64 and 1/32, at the scale of these few ticks. Only the worst
 *             clocks are explored, slow for who holds and fast for who waits: a contender may also
 *             give up at any time, and pause before it goes on, which is what better ones do.
 *   versions  An expected version is right or wrong. Each write of another contender makes it
 *             wrong, so a flag stands for it, which such a write clears.
 *   servers   What a contender reads may be old, because its server lags behind the leader. Here it
 *             reads what the leader has. It may pause after that, which is the same: its wait counts
 *             from the reading, and so ends later, if at all, when it reads late.
 *   names     A contender that queues again has a new node. `mine` says whether the record names
 *             the present one.
 *   answers   A request has an answer, or none that reaches the contender. One without an answer may
 *             still be executed, at any later time (`stray`), as a server may keep it.
 *
 * Each macro leaves one rule out. models.py runs the model without any, which must hold, and with
 * each of them, which must not. WITNESS claims that nobody follows another holder, which is wrong,
 * or the model would prove nothing. */

#ifndef CONTENDERS
#define CONTENDERS 3
#endif
#define LEASE 2

#ifdef NO_HOLD_ALLOWANCE    /* contenders hold for LEASE ticks by their own clocks */
#define HOLD LEASE
#else
#define HOLD (LEASE - 1)
#endif
#ifdef NO_WAIT_ALLOWANCE    /* contenders wait for LEASE ticks by their own clocks */
#define WAIT LEASE
#else
#define WAIT (LEASE + 1)
#endif
#define LONGEST (HOLD + 1)      /* that a contender holds, by a slow clock */
#define SHORTEST (WAIT - 1)     /* that it waits, by a fast one */

mtype = { OUT, QUEUED, WAITING, ASKING, HOLDING, LEAVING };     /* a contender */
mtype = { NONE, SENT, DONE };                                   /* its request */

/* The leader's state: nodes in their order (number + 1; 0: none), and whom the record names. */
byte nodes[CONTENDERS];
byte record;                /* number + 1; 0: free */
#define GONE (CONTENDERS + 1)   /* it names a node that its contender no longer has */

typedef Contender {
    mtype at = OUT;
    mtype request = NONE;
    byte age;               /* ticks since it was sent; from LONGEST on they are not counted */
    byte lease;             /* ticks for which it still holds */
    byte wait;              /* ticks for which it still waits */
    bool node;              /* the leader has its node */
    bool mine;              /* it has written the record since it queued */
    bool current;           /* the version that it knows is that of the record */
    bool asked_current;     /* the same of the request under way */
    bool stray;             /* a request without an answer may still be executed */
    bool stray_current;
#ifdef RENEW_BY_READ
    bool sees_node;         /* its server believes that its node exists */
#endif
};
Contender c[CONTENDERS];
byte k, n;                  /* of the loops below; 0 outside them */

inline remove_node(i) {
    do
    :: k < CONTENDERS ->
        if
        :: nodes[k] != 0 && nodes[k] != i + 1 -> nodes[n] = nodes[k]; n++
        :: else -> skip
        fi;
        k++
    :: else -> break
    od;
    do
    :: n < CONTENDERS -> nodes[n] = 0; n++
    :: else -> break
    od;
    k = 0;
    n = 0;
    c[i].node = false
}

inline add_node(i) {
    do
    :: nodes[n] != 0 -> n++
    :: else -> break
    od;
    nodes[n] = i + 1;
    n = 0;
    c[i].node = true
}

inline write_record(value) {
    record = value;
    do
    :: n < CONTENDERS ->
        c[n].current = false;
        c[n].asked_current = false;
        c[n].stray_current = false;
        n++
    :: else -> break
    od;
    n = 0
}

#ifdef WITNESS
byte last_holder;           /* number + 1 */
#endif

inline grant(i, ticks) {
    c[i].lease = ticks;
#ifdef WITNESS
    assert(ticks == 0 || last_holder == 0 || last_holder == i + 1);
    last_holder = (ticks > 0 -> i + 1 : last_holder);
#endif
    do
    :: n < CONTENDERS ->
        assert(n == i || ticks == 0 || c[n].lease == 0);
        n++
    :: else -> break
    od;
    n = 0
}

/* The contender waits for an answer no longer. */
inline give_up_request(i) {
    c[i].stray = (c[i].request == SENT);
    c[i].stray_current = (c[i].request == SENT && c[i].asked_current);
    c[i].asked_current = false;
    c[i].request = NONE;
    c[i].age = 0
}

inline read_again(i) {
    c[i].current = false;
    c[i].at = QUEUED
}

/* {check the own node, set the record at the expected version} */
#ifdef NO_CHECK
#define MAY_WRITE(i, version) true
#else
#define MAY_WRITE(i, version) (c[i].node && (version))
#endif

proctype contender(byte i) {
end:
    do
    /* It makes its node; one of an earlier session has to go first. */
    :: atomic { c[i].at == OUT && !c[i].node -> add_node(i); c[i].at = QUEUED }

    /* Its node is the first one: it reads the record, and waits for the lease of another. */
    :: atomic { c[i].at == QUEUED && nodes[0] == i + 1 ->
        c[i].current = true;
#ifndef NO_WAIT
        c[i].wait = (record == 0 || (record == i + 1 && c[i].mine) -> 0 : SHORTEST);
#endif
        c[i].at = WAITING }

    /* It asks for the lease, or for its renewal. */
    :: atomic { (c[i].at == WAITING && c[i].wait == 0) || (c[i].at == HOLDING && c[i].lease > 0) ->
        c[i].request = SENT;
        c[i].asked_current = c[i].current;
        c[i].at = ASKING }

    /* The lease counts from the sending. */
    :: atomic { c[i].at == ASKING && c[i].request == DONE ->
#ifdef FROM_ANSWER
        grant(i, LONGEST);
#else
        grant(i, LONGEST - c[i].age);
#endif
        c[i].request = NONE;
        c[i].age = 0;
        c[i].mine = true;
        c[i].at = HOLDING }

    /* No answer comes: the version is unknown, so it reads again. A lease goes on. */
    :: atomic { c[i].at == ASKING && !c[i].stray -> give_up_request(i); read_again(i) }

#ifdef RENEW_BY_READ
    :: atomic { c[i].at == HOLDING && c[i].lease > 0 && c[i].sees_node -> grant(i, LONGEST) }
#endif
    /* It releases the lock, or finds its lease over. */
    :: atomic { c[i].at == HOLDING || (c[i].at == QUEUED && c[i].mine) ->
        c[i].lease = 0;
        c[i].current = false;
        c[i].at = LEAVING }

    /* It hears that its node is gone. What it has asked fails the check of that node. */
    :: atomic { c[i].at != OUT && !c[i].node ->
#ifdef NO_CHECK
        if
        :: c[i].request != NONE && !c[i].stray -> give_up_request(i)
        :: else -> c[i].request = NONE
        fi;
#else
        c[i].stray = false;
        c[i].stray_current = false;
        c[i].asked_current = false;
        c[i].request = NONE;
#endif
        record = (record == i + 1 -> GONE : record);
        c[i].age = 0;
        c[i].lease = 0;
        c[i].wait = 0;
        c[i].current = false;
        c[i].mine = false;
        c[i].at = OUT }
    od
}

/* What the leader does for a contender. */
proctype leader(byte i) {
end:
    do
    :: atomic { c[i].request == SENT ->
        if
        :: MAY_WRITE(i, c[i].asked_current) ->
            write_record(i + 1);
            c[i].current = true;
            c[i].request = DONE
        :: else ->  /* the contender reads again when it learns of that; a lease goes on */
            c[i].request = NONE;
            c[i].age = 0;
            read_again(i)
        fi;
        c[i].asked_current = false }
    :: atomic { c[i].stray ->
        if
        :: MAY_WRITE(i, c[i].stray_current) -> write_record(i + 1)
        :: true -> skip             /* it was lost, or is refused */
        fi;
        c[i].stray = false;
        c[i].stray_current = false }
    /* {delete the own node, set the record free}: no version is expected */
    :: atomic { c[i].at == LEAVING && c[i].node ->
        remove_node(i);
        write_record(0) }
    :: atomic { c[i].node -> remove_node(i) }   /* the session ends */
#ifdef RENEW_BY_READ
    :: atomic { c[i].sees_node != c[i].node -> c[i].sees_node = c[i].node }
#endif
    od
}

proctype time() {
    byte i;
end:
    do
    :: atomic {
        do
        :: i < CONTENDERS ->
            c[i].lease = (c[i].lease > 0 -> c[i].lease - 1 : 0);
            c[i].wait = (c[i].wait > 0 -> c[i].wait - 1 : 0);
            c[i].age = (c[i].request != NONE && c[i].age < LONGEST -> c[i].age + 1 : c[i].age);
            i++
        :: else -> break
        od;
        i = 0 }
    od
}

init {
    byte i;
    atomic {
        do
        :: i < CONTENDERS -> run contender(i); run leader(i); i++
        :: else -> break
        od;
        run time()
    }
}

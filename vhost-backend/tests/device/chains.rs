//! A guest may put anything into a ring. Whatever it is: exactly one answer or a dead ring, nothing written outside the
//! chain's own writable bytes, nothing submitted that is not a checked request, and the next good request works.

use evolute_vhost_backend::backing::Request;
use evolute_vhost_backend::device::DeviceConfig;

use crate::disk::{Disk, Served};
use crate::front_end::{
    BORDER, D, DISCARD, Driver, F_EVENT_IDX, F_INDIRECT, FAR, FLUSH, FREE, FrontEnd, GET_ID, GuestMemory,
    HOLE, IN, INDIRECT, NEXT, OUT, REGION_LEN, WRITE, WRITE_ZEROES, data_of, header, place, slot_at,
    status_of,
};

const CAPACITY: u64 = 8 << 20;
const SECTORS: u64 = CAPACITY / 512;
const RING: u16 = 64;
/// Where a case keeps its header, its status byte, an indirect table, and data.
const HEAD: u64 = FREE;
const STATUS: u64 = FREE + 64;
const TABLE: u64 = FREE + 4096;
const DATA: u64 = FREE + (64 << 10);
const MARK: u8 = 0xab;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

#[derive(Clone, Debug)]
enum Expect {
    /// This status at this address, and this length in the used ring.
    Answer(u64, u8, u32),
    /// An answer without a status: there is no place for one.
    Silent,
}

struct Case {
    name: &'static str,
    header: [u8; 16],
    /// Descriptors from entry 0; the head is 0.
    chain: Vec<D>,
    /// Bytes at `TABLE`: an indirect table, or the ranges of a discard.
    at_table: Vec<u8>,
    expect: Expect,
    /// What the backing sees of it.
    submitted: Vec<Request>,
}

fn status(code: u8) -> Expect {
    Expect::Answer(STATUS, code, 1)
}

fn case(name: &'static str, kind: u32, sector: u64, chain: Vec<D>, expect: Expect) -> Case {
    Case { name, header: header(kind, sector), chain, at_table: Vec::new(), expect, submitted: Vec::new() }
}

impl Case {
    fn table(mut self, table: &[D]) -> Case {
        self.at_table = table.iter().flat_map(D::bytes).collect();
        self
    }

    fn bytes(mut self, bytes: Vec<u8>) -> Case {
        self.at_table = bytes;
        self
    }

    fn submits(mut self, requests: Vec<Request>) -> Case {
        self.submitted = requests;
        self
    }
}

fn read(offset: u64, len: u32) -> Request {
    Request::Read { offset, len }
}

fn write(offset: u64, len: usize) -> Request {
    Request::Write { offset, data: vec![MARK; len].into() }
}

fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

/// header, data, status.
fn three(data: u64, len: u32, flags: u16) -> Vec<D> {
    vec![D(HEAD, 16, NEXT, 1), D(data, len, NEXT | flags, 2), D(STATUS, 1, WRITE, 0)]
}

fn indirect(entries: u32) -> Vec<D> {
    vec![D(TABLE, entries * 16, INDIRECT, 0)]
}

/// A discard or write-zeroes with the bytes at `TABLE` as its ranges.
fn ranged(len: u32) -> Vec<D> {
    vec![D(HEAD, 16, NEXT, 1), D(TABLE, len, NEXT, 2), D(STATUS, 1, WRITE, 0)]
}

/// A chain of `count` buffers of `len` between header and status.
fn long_read(count: u16, len: u32) -> Vec<D> {
    let mut chain = vec![D(HEAD, 16, NEXT, 1)];
    for i in 0..count {
        chain.push(D(DATA + u64::from(i) * u64::from(len), len, NEXT | WRITE, i + 2));
    }
    chain.push(D(STATUS, 1, WRITE, 0));
    chain
}

fn well_formed() -> Vec<Case> {
    vec![
        case("read", IN, 8, three(DATA, 4096, WRITE), Expect::Answer(STATUS, OK, 4097))
            .submits(vec![read(4096, 4096)]),
        case("write", OUT, 8, three(DATA, 4096, 0), status(OK)).submits(vec![write(4096, 4096)]),
        case("last sector", IN, SECTORS - 1, three(DATA, 512, WRITE), Expect::Answer(STATUS, OK, 513))
            .submits(vec![read(CAPACITY - 512, 512)]),
        case("flush", FLUSH, 0, vec![D(HEAD, 16, NEXT, 1), D(STATUS, 1, WRITE, 0)], status(OK)),
        case("serial", GET_ID, 0, three(DATA, 20, WRITE), Expect::Answer(STATUS, OK, 21)),
        case("serial, room for five", GET_ID, 0, three(DATA, 5, WRITE), Expect::Answer(STATUS, OK, 6)),
        case(
            "data and status in one buffer",
            IN,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(DATA, 513, WRITE, 0)],
            Expect::Answer(DATA + 512, OK, 513),
        )
        .submits(vec![read(0, 512)]),
        case(
            "header and payload in one buffer",
            OUT,
            0,
            vec![
                D(HEAD, 16, NEXT, 1),
                D(DATA, 100, NEXT, 2),
                D(DATA + 100, 412, NEXT, 3),
                D(STATUS, 1, WRITE, 0),
            ],
            status(OK),
        )
        .submits(vec![write(0, 512)]),
        case(
            "header in three pieces",
            OUT,
            0,
            vec![
                D(HEAD, 3, NEXT, 1),
                D(HEAD + 3, 9, NEXT, 2),
                D(HEAD + 12, 4, NEXT, 3),
                D(DATA, 512, NEXT, 4),
                D(STATUS, 1, WRITE, 0),
            ],
            status(OK),
        )
        .submits(vec![write(0, 512)]),
        case(
            "buffer across regions",
            IN,
            0,
            three(BORDER - 1000, 4096, WRITE),
            Expect::Answer(STATUS, OK, 4097),
        )
        .submits(vec![read(0, 4096)]),
        case("payload across regions", OUT, 0, three(BORDER - 1000, 4096, 0), status(OK))
            .submits(vec![write(0, 4096)]),
        case("far region", IN, 0, three(FAR, 512, WRITE), Expect::Answer(STATUS, OK, 513))
            .submits(vec![read(0, 512)]),
        case("indirect", IN, 0, indirect(3), Expect::Answer(STATUS, OK, 513))
            .table(&three(DATA, 512, WRITE))
            .submits(vec![read(0, 512)]),
        case(
            "header direct, rest indirect",
            IN,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(TABLE, 32, INDIRECT, 0)],
            Expect::Answer(STATUS, OK, 513),
        )
        .table(&[D(DATA, 512, NEXT | WRITE, 1), D(STATUS, 1, WRITE, 0)])
        .submits(vec![read(0, 512)]),
        case(
            "indirect table walked backwards",
            IN,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(TABLE, 48, INDIRECT, 0)],
            Expect::Answer(STATUS, OK, 513),
        )
        .table(&[D(DATA, 512, NEXT | WRITE, 2), D(0, 0, 0, 0), D(STATUS, 1, WRITE, 0)])
        .submits(vec![read(0, 512)]),
        case(
            "the whole ring as one chain",
            IN,
            0,
            long_read(62, 512),
            Expect::Answer(STATUS, OK, 62 * 512 + 1),
        )
        .submits(vec![read(0, 62 * 512)]),
        case("discard", DISCARD, 0, ranged(16), status(OK))
            .bytes(range(16, 8, 0))
            .submits(vec![Request::Discard { offset: 8192, len: 4096 }]),
        case("discard of two ranges and an empty one", DISCARD, 0, ranged(48), status(OK))
            .bytes([range(16, 8, 0), range(3, 0, 0), range(SECTORS - 1, 1, 0)].concat())
            .submits(vec![
                Request::Discard { offset: 8192, len: 4096 },
                Request::Discard { offset: CAPACITY - 512, len: 512 },
            ]),
        case("discard of nothing", DISCARD, 0, ranged(16), status(OK)).bytes(range(16, 0, 0)),
        case("write zeroes", WRITE_ZEROES, 0, ranged(32), status(OK))
            .bytes([range(0, 1, 0), range(1, 1, 1)].concat())
            .submits(vec![
                Request::WriteZeroes { offset: 0, len: 512, unmap: false },
                Request::WriteZeroes { offset: 512, len: 512, unmap: true },
            ]),
    ]
}

fn broken() -> Vec<Case> {
    let silent = || Expect::Silent;
    vec![
        // Lengths and sectors.
        case("read of nothing", IN, 0, vec![D(HEAD, 16, NEXT, 1), D(STATUS, 1, WRITE, 0)], status(IOERR)),
        case("write of nothing", OUT, 0, vec![D(HEAD, 16, NEXT, 1), D(STATUS, 1, WRITE, 0)], status(IOERR)),
        case("read of half a sector", IN, 0, three(DATA, 256, WRITE), status(IOERR)),
        case("write of a sector and a byte", OUT, 0, three(DATA, 513, 0), status(IOERR)),
        case("read beyond the end", IN, SECTORS, three(DATA, 512, WRITE), status(IOERR)),
        case("write over the end", OUT, SECTORS - 1, three(DATA, 1024, 0), status(IOERR)),
        case("sector times 512 overflows", IN, u64::MAX / 512 + 1, three(DATA, 512, WRITE), status(IOERR)),
        case("offset plus length overflows", IN, u64::MAX / 512, three(DATA, 512, WRITE), status(IOERR)),
        case("sector of all ones", OUT, u64::MAX, three(DATA, 512, 0), status(IOERR)),
        case("longer than we advertise", IN, 0, three(DATA, (1 << 20) + 512, WRITE), status(IOERR)),
        case("much longer, written", OUT, 0, three(DATA, 2 << 20, 0), status(IOERR)),
        // Directions.
        case("read into a readable buffer", IN, 0, three(DATA, 512, 0), status(IOERR)),
        case("write from a writable buffer", OUT, 0, three(DATA, 512, WRITE), status(IOERR)),
        case(
            "readable after writable",
            IN,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(STATUS, 1, WRITE | NEXT, 2), D(DATA, 512, 0, 0)],
            status(IOERR),
        ),
        case(
            "payload after the status",
            OUT,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(STATUS, 1, WRITE | NEXT, 2), D(DATA, 512, 0, 0)],
            status(IOERR),
        ),
        case(
            "serial into nothing",
            GET_ID,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(STATUS, 1, WRITE, 0)],
            status(IOERR),
        ),
        case("discard with a buffer to fill", DISCARD, 0, three(DATA, 16, WRITE), status(IOERR)),
        // Header and status.
        case(
            "header of 15 bytes",
            IN,
            0,
            vec![D(HEAD, 15, NEXT, 1), D(DATA, 512, WRITE | NEXT, 2), D(STATUS, 1, WRITE, 0)],
            status(IOERR),
        ),
        case("nothing but a status", IN, 0, vec![D(STATUS, 1, WRITE, 0)], status(IOERR)),
        case("no status at all", OUT, 0, vec![D(HEAD, 16, NEXT, 1), D(DATA, 512, 0, 0)], silent()),
        case("a lone header", FLUSH, 0, vec![D(HEAD, 16, 0, 0)], silent()),
        case(
            "status outside memory",
            OUT,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(DATA, 512, NEXT, 2), D(HOLE, 1, WRITE, 0)],
            silent(),
        ),
        case(
            "status of no bytes",
            OUT,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(DATA, 512, NEXT, 2), D(STATUS, 0, WRITE, 0)],
            silent(),
        ),
        case(
            "status at the end of the address space",
            OUT,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(DATA, 512, NEXT, 2), D(u64::MAX, 2, WRITE, 0)],
            silent(),
        ),
        // Buffers outside memory.
        case(
            "header in a hole",
            OUT,
            0,
            vec![D(HOLE, 16, NEXT, 1), D(DATA, 512, NEXT, 2), D(STATUS, 1, WRITE, 0)],
            status(IOERR),
        ),
        case("data in a hole", IN, 0, three(HOLE, 512, WRITE), status(IOERR)),
        case("payload in a hole", OUT, 0, three(HOLE, 512, 0), status(IOERR)),
        case("data over the edge of a hole", IN, 0, three(HOLE - 256, 512, WRITE), status(IOERR)),
        case("data past the last region", IN, 0, three(FAR + REGION_LEN - 511, 512, WRITE), status(IOERR)),
        case("address plus length overflows", OUT, 0, three(u64::MAX - 255, 512, 0), status(IOERR)),
        case("four gigabytes, almost", IN, 0, three(DATA, u32::MAX, WRITE), status(IOERR)),
        case("buffers of no length", IN, 0, three(DATA, 0, WRITE), status(IOERR)),
        // Chains.
        case("next outside the table", IN, 0, vec![D(HEAD, 16, NEXT, RING)], silent()),
        case("next far outside the table", IN, 0, vec![D(HEAD, 16, NEXT, 0xffff)], silent()),
        case("a chain that is its own next", IN, 0, vec![D(HEAD, 16, NEXT, 0)], silent()),
        case("a loop of two", OUT, 0, vec![D(HEAD, 16, NEXT, 1), D(DATA, 512, NEXT, 0)], silent()),
        case(
            "a loop of writable buffers",
            IN,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(DATA, 512, NEXT | WRITE, 1)],
            silent(),
        ),
        case("sums of more than four gigabytes", IN, 0, indirect(1024), status(IOERR)).table(&{
            let mut table = vec![D(HEAD, 16, NEXT, 1)];
            table.extend((2..1024).map(|next| D(0, 4 << 20, NEXT | WRITE, next)));
            table.push(D(STATUS, 1, WRITE, 0));
            table
        }),
        // Indirect tables.
        case(
            "indirect and next",
            IN,
            0,
            vec![D(TABLE, 48, INDIRECT | NEXT, 1), D(STATUS, 1, WRITE, 0)],
            silent(),
        )
        .table(&three(DATA, 512, WRITE)),
        case("writable indirect table", IN, 0, vec![D(TABLE, 48, INDIRECT | WRITE, 0)], silent())
            .table(&three(DATA, 512, WRITE)),
        case("indirect table inside one", IN, 0, indirect(1), silent()).table(&[D(TABLE, 16, INDIRECT, 0)]),
        case("empty indirect table", IN, 0, indirect(0), silent()),
        case("indirect table with a remainder", IN, 0, vec![D(TABLE, 63, INDIRECT, 0)], silent())
            .table(&three(DATA, 512, WRITE)),
        case("indirect table in a hole", IN, 0, vec![D(HOLE, 48, INDIRECT, 0)], silent()),
        case("indirect table over the edge", IN, 0, vec![D(HOLE - 16, 48, INDIRECT, 0)], silent()),
        case("indirect table of 4 GiB", IN, 0, vec![D(TABLE, !15, INDIRECT, 0)], silent()),
        case("indirect table of 1025 entries", IN, 0, indirect(1025), silent())
            .table(&three(DATA, 512, WRITE)),
        case("next outside the indirect table", IN, 0, indirect(3), silent()).table(&[
            D(HEAD, 16, NEXT, 1),
            D(DATA, 512, NEXT | WRITE, 3),
            D(STATUS, 1, WRITE, 0),
        ]),
        case("loop in an indirect table", IN, 0, indirect(2), silent())
            .table(&[D(HEAD, 16, NEXT, 1), D(DATA, 512, NEXT | WRITE, 1)]),
        case(
            "header in a hole, rest indirect",
            OUT,
            0,
            vec![D(HOLE, 16, NEXT, 1), D(TABLE, 32, INDIRECT, 0)],
            status(IOERR),
        )
        .table(&[D(DATA, 512, NEXT, 1), D(STATUS, 1, WRITE, 0)]),
        // Types and ranges.
        case("unknown type", 99, 0, three(DATA, 512, WRITE), status(UNSUPP)),
        case("SCSI passthrough", 2, 0, three(DATA, 512, WRITE), status(UNSUPP)),
        case("secure erase", 14, 0, ranged(16), status(UNSUPP)).bytes(range(0, 8, 0)),
        case("zone append", 15, 0, three(DATA, 512, 0), status(UNSUPP)),
        case(
            "discard without ranges",
            DISCARD,
            0,
            vec![D(HEAD, 16, NEXT, 1), D(STATUS, 1, WRITE, 0)],
            status(IOERR),
        ),
        case("discard with half a range", DISCARD, 0, ranged(8), status(IOERR)).bytes(range(0, 8, 0)),
        case("discard with one and a half", DISCARD, 0, ranged(24), status(IOERR)).bytes(range(0, 8, 0)),
        case("discard with 17 ranges", DISCARD, 0, ranged(17 * 16), status(IOERR))
            .bytes(range(0, 8, 0).repeat(17)),
        case("discard beyond the end", DISCARD, 0, ranged(16), status(IOERR)).bytes(range(SECTORS, 1, 0)),
        case("second range beyond the end", DISCARD, 0, ranged(32), status(IOERR))
            .bytes([range(0, 8, 0), range(SECTORS - 1, 2, 0)].concat()),
        case("discard with sector overflow", DISCARD, 0, ranged(16), status(IOERR)).bytes(range(
            u64::MAX,
            1,
            0,
        )),
        case("discard of four billion sectors", DISCARD, 0, ranged(16), status(IOERR)).bytes(range(
            0,
            u32::MAX,
            0,
        )),
        case("discard with unmap flag", DISCARD, 0, ranged(16), status(UNSUPP)).bytes(range(0, 8, 1)),
        case("write zeroes with a reserved flag", WRITE_ZEROES, 0, ranged(16), status(UNSUPP))
            .bytes(range(0, 8, 2)),
        case("write zeroes beyond the end", WRITE_ZEROES, 0, ranged(16), status(IOERR))
            .bytes(range(SECTORS, 8, 1)),
    ]
}

/// Every byte of guest memory that a device could reach, without the rings.
fn everything(memory: &GuestMemory) -> Vec<u8> {
    let mut all = memory.read(FREE, (HOLE - FREE) as usize);
    all.extend(memory.read(FAR, REGION_LEN as usize));
    all
}

fn paint(memory: &GuestMemory) {
    memory.write(FREE, &vec![MARK; (HOLE - FREE) as usize]);
    memory.write(FAR, &vec![MARK; REGION_LEN as usize]);
}

fn place_in(all: &mut [u8], at: u64, bytes: &[u8]) {
    let start = if at >= FAR { (HOLE - FREE) + (at - FAR) } else { at - FREE } as usize;
    all[start..start + bytes.len()].copy_from_slice(bytes);
}

fn check(cases: Vec<Case>, features: u64, config: DeviceConfig) {
    let disk = Disk::new(CAPACITY as usize);
    let served = Served::start(config, &disk);
    let memory = GuestMemory::new();
    let mut front_end = FrontEnd::connect_with(&served.path, features);
    front_end.set_memory(&memory);
    let mut driver = Driver::new(0, RING);
    front_end.start(&memory, &mut driver, 0);
    let mut seen = 0;
    for case in cases {
        let name = case.name;
        paint(&memory);
        memory.write(HEAD, &case.header);
        memory.write(TABLE, &case.at_table);
        driver.table(&memory, 0, &case.chain);
        let mut expected = everything(&memory);

        driver.offer(&memory, 0);
        driver.kick();
        let used = driver.wait_used(&memory, 1);

        let submitted = disk.seen().split_off(seen);
        seen += submitted.len();
        assert_eq!(submitted, case.submitted, "{name}: what the backing saw");
        match case.expect {
            Expect::Answer(at, code, len) => {
                assert_eq!(used, [(0, len)], "{name}: the used ring");
                assert_eq!(memory.read(at, 1), [code], "{name}: the status");
                place_in(&mut expected, at, &[code]);
                if len > 1 {
                    continue; // data came in; the reads below look at that
                }
            }
            Expect::Silent => assert_eq!(used, [(0, 0)], "{name}: the used ring"),
        }
        assert!(everything(&memory) == expected, "{name}: guest memory was touched");
        let _ = status_of(&memory, 0);
    }
    // The ring lived through all of it.
    disk.fill(1024, &[7; 512]);
    let head = place(&memory, &driver, 5, IN, 2, Err(512));
    driver.offer(&memory, head);
    driver.kick();
    assert_eq!(driver.wait_used(&memory, 1), [(head, 513)]);
    assert_eq!((status_of(&memory, 5), data_of(&memory, 5, 512)), (OK, vec![7; 512]));
}

#[test]
fn well_formed_chains_of_any_shape_are_understood() {
    check(well_formed(), F_EVENT_IDX | F_INDIRECT, DeviceConfig::new(CAPACITY));
}

#[test]
fn malformed_chains_are_refused_and_touch_nothing() {
    check(broken(), F_EVENT_IDX | F_INDIRECT, DeviceConfig::new(CAPACITY));
}

#[test]
fn interrupts_and_kicks_work_without_event_indexes() {
    check(well_formed(), F_INDIRECT, DeviceConfig::new(CAPACITY));
}

#[test]
fn spinning_changes_nothing_but_time() {
    let mut config = DeviceConfig::new(CAPACITY);
    config.spin_us = 200;
    check(well_formed(), F_EVENT_IDX | F_INDIRECT, config);
}

#[test]
fn a_read_only_disk_submits_nothing_that_changes_data() {
    let cases = vec![
        case("read", IN, 8, three(DATA, 4096, WRITE), Expect::Answer(STATUS, OK, 4097))
            .submits(vec![read(4096, 4096)]),
        case("write", OUT, 8, three(DATA, 4096, 0), status(IOERR)),
        case("discard", DISCARD, 0, ranged(16), status(IOERR)).bytes(range(16, 8, 0)),
        case("write zeroes", WRITE_ZEROES, 0, ranged(16), status(IOERR)).bytes(range(16, 8, 0)),
        case("flush", FLUSH, 0, vec![D(HEAD, 16, NEXT, 1), D(STATUS, 1, WRITE, 0)], status(OK)),
    ];
    let mut config = DeviceConfig::new(CAPACITY);
    config.read_only = true;
    check(cases, F_EVENT_IDX | F_INDIRECT, config);
}

/// Data land where the chain says, in order, and nowhere else, also across regions.
#[test]
fn a_read_fills_exactly_its_buffers() {
    let disk = Disk::new(CAPACITY as usize);
    let pattern: Vec<u8> = (0..4096u32).map(|i| (i * 7 + i / 256) as u8).collect();
    disk.fill(0, &pattern);
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let memory = GuestMemory::new();
    let mut front_end = FrontEnd::connect(&served.path);
    front_end.set_memory(&memory);
    let mut driver = Driver::new(0, RING);
    front_end.start(&memory, &mut driver, 0);
    paint(&memory);
    memory.write(HEAD, &header(IN, 0));
    driver.table(
        &memory,
        0,
        &[
            D(HEAD, 16, NEXT, 1),
            D(BORDER - 100, 300, NEXT | WRITE, 2),
            D(FAR + 5, 3000, NEXT | WRITE, 3),
            D(DATA, 797, WRITE, 0),
        ],
    );
    driver.offer(&memory, 0);
    driver.kick();
    assert_eq!(driver.wait_used(&memory, 1), [(0, 4097)]);
    let mut got = memory.read(BORDER - 100, 300);
    got.extend(memory.read(FAR + 5, 3000));
    got.extend(memory.read(DATA, 796));
    assert!(got == pattern, "the data");
    for (at, what) in [(BORDER - 101, MARK), (BORDER + 200, MARK), (FAR + 4, MARK), (FAR + 3005, MARK)] {
        assert_eq!(memory.read(at, 1), [what], "a neighbour at {at:#x}");
    }
    assert_eq!(memory.read(DATA + 796, 2), [OK, MARK]);
}

#[test]
fn the_serial_number_is_padded_and_cut() {
    for (serial, expected) in [
        ("abc", *b"abc\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0"),
        ("0123456789abcdefghijklm", *b"0123456789abcdefghij"),
    ] {
        let mut config = DeviceConfig::new(CAPACITY);
        config.serial = serial.into();
        let served = Served::start(config, &Disk::new(CAPACITY as usize));
        let memory = GuestMemory::new();
        let mut front_end = FrontEnd::connect(&served.path);
        front_end.set_memory(&memory);
        let mut driver = Driver::new(0, RING);
        front_end.start(&memory, &mut driver, 0);
        let head = place(&memory, &driver, 0, GET_ID, 0, Err(20));
        driver.offer(&memory, head);
        driver.kick();
        driver.wait_used(&memory, 1);
        assert_eq!(memory.read(slot_at(0) + 32, 20), expected);
    }
}

/// The guest changes its buffer right after handing it over; the disk gets what was there when it was taken, as one piece.
#[test]
fn a_write_is_copied_once_before_it_goes_anywhere() {
    let disk = Disk::new(CAPACITY as usize);
    disk.hold();
    let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
    let memory = GuestMemory::new();
    let mut front_end = FrontEnd::connect(&served.path);
    front_end.set_memory(&memory);
    let mut driver = Driver::new(0, RING);
    front_end.start(&memory, &mut driver, 0);
    let head = place(&memory, &driver, 0, OUT, 0, Ok(&[1; 4096]));
    driver.offer(&memory, head);
    driver.kick();
    disk.wait_seen(1);
    memory.write(slot_at(0) + 32, &[2; 4096]);
    disk.release_all();
    driver.wait_used(&memory, 1);
    assert_eq!(disk.bytes(0, 4096), [1; 4096]);
}

/// A driver that breaks the ring itself loses that ring, and only that.
#[test]
fn a_broken_ring_stops_and_its_neighbour_goes_on() {
    type Break = fn(&GuestMemory, &mut Driver);
    let breaks: [(&str, Break); 3] = [
        ("a head outside the table", |memory, driver| driver.offer(memory, RING)),
        ("an index that jumps", |memory, driver| {
            memory.set_u16(driver.avail() + 2, driver.next_avail.0.wrapping_add(RING + 1));
        }),
        ("a head offered twice", |memory, driver| {
            let head = place(memory, driver, 0, IN, 0, Err(512));
            driver.offer(memory, head);
            driver.offer(memory, head);
        }),
    ];
    for (name, break_it) in breaks {
        let disk = Disk::new(CAPACITY as usize);
        disk.hold();
        let served = Served::start(DeviceConfig::new(CAPACITY), &disk);
        let memory = GuestMemory::new();
        let mut front_end = FrontEnd::connect(&served.path);
        front_end.set_memory(&memory);
        let (mut bad, mut good) = (Driver::new(0, RING), Driver::new(1, RING));
        front_end.start(&memory, &mut bad, 0);
        front_end.start(&memory, &mut good, 0);
        break_it(&memory, &mut bad);
        bad.kick();
        let head = place(&memory, &good, 9, IN, 0, Err(512));
        good.offer(&memory, head);
        good.kick();
        disk.wait_seen(1);
        disk.release_all();
        assert_eq!(good.wait_used(&memory, 1), [(head, 513)], "{name}");
        // Set up again, it works again.
        front_end.vhost_stop(0);
        assert!(disk.seen().len() <= 2, "{name}: what came after it was taken");
        let mut fresh = Driver::new(0, RING);
        let base = bad.used_idx(&memory);
        fresh.next_avail = std::num::Wrapping(base);
        fresh.seen_used = fresh.next_avail;
        memory.set_u16(fresh.avail() + 2, base);
        front_end.start(&memory, &mut fresh, base);
        let head = place(&memory, &fresh, 3, IN, 0, Err(512));
        fresh.offer(&memory, head);
        fresh.kick();
        assert_eq!(fresh.wait_used(&memory, 1), [(head, 513)], "{name}, afterwards");
    }
}

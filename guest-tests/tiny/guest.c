/* A guest of a few kilobytes: no operating system, two virtio-blk disks, no interrupts. It does what it is told over the first
 * serial port, a line at a time, and ends each answer with a line "ok". Unlike any real guest it can be told to leave a
 * request unanswered and to use the buffer of another again, and it is in memory in no time.
 *
 *   init NUMBER                finds the disk of this number (0, 1), starts it, and means it from here on
 *   disk NUMBER                means this one from here on
 *   eject                      gives its slot back to the VMM, which wants it
 *   learn                      reads the blocks of load and takes what is in them for what it wrote; the sum of all
 *   sum                        of what it has written
 *   write SECTOR VALUE         4 KiB of this 64-bit value, waits
 *   read SECTOR VALUE          how many of the 512 values differ
 *   hold SECTOR OTHER          writes 0xaaaa and does not wait; writes 0xcccc at OTHER, waits for that, and reuses its buffer
 *   held                       waits until the first is answered
 *   load DEPTH                 random reads and writes of 256 blocks until the next line comes, each read compared with the
 *                              last answered write
 *   check                      compares all blocks that load wrote
 */
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

static void out8(u16 port, u8 value) { __asm__ volatile("outb %0, %1" ::"a"(value), "Nd"(port)); }
static void out32(u16 port, u32 value) { __asm__ volatile("outl %0, %1" ::"a"(value), "Nd"(port)); }
static u8 in8(u16 port) { u8 value; __asm__ volatile("inb %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static u32 in32(u16 port) { u32 value; __asm__ volatile("inl %1, %0" : "=a"(value) : "Nd"(port)); return value; }
static void fence(void) { __asm__ volatile("lock; addl $0, (%%rsp)" ::: "memory"); }

void *memset(void *at, int value, u64 len) { for (u8 *p = at; len--;) *p++ = value; return at; }

/* ---- the serial port */

#define COM1 0x3f8
static void say(const char *text) { while (*text) { while (!(in8(COM1 + 5) & 0x20)); out8(COM1, *text++); } }
static void say_number(u64 value)
{
        char digits[21], *at = digits + 20;
        *at = 0;
        do *--at = '0' + value % 10; while (value /= 10);
        say(at);
}
static void tell(const char *name, u64 value) { say(name); say(" "); say_number(value); say("\n"); }

static char line[80];
static int is_told(void) { return in8(COM1 + 5) & 1; }
static void hear(void)
{
        for (int len = 0;;) {
                while (!is_told()) __asm__ volatile("pause");
                char c = in8(COM1);
                if (c == '\n' || c == '\r') { line[len] = 0; return; }
                if (len < 79) line[len++] = c;
        }
}
static int is(const char *word) { const char *at = line; while (*word) if (*at++ != *word++) return 0; return *at == 0 || *at == ' '; }
static u64 argument(int nth)
{
        const char *at = line;
        while (nth--) { while (*at && *at != ' ') at++; while (*at == ' ') at++; }
        u64 value = 0;
        while (*at >= '0' && *at <= '9') value = value * 10 + *at++ - '0';
        return value;
}

/* ---- PCI and the device */

static u32 pci(u32 slot, u32 at) { out32(0xcf8, 0x80000000u | slot << 11 | (at & 0xfc)); return in32(0xcfc); }
static void pci_set(u32 slot, u32 at, u32 value) { pci(slot, 0); out32(0xcf8, 0x80000000u | slot << 11 | (at & 0xfc)); out32(0xcfc, value); }
static u8 pci8(u32 slot, u32 at) { return pci(slot, at) >> 8 * (at & 3); }

struct common {
        u32 offered_half, offered, accepted_half, accepted;
        u16 config_vector, queues;
        u8 status, generation;
        u16 queue, size, vector, enabled, notify;
        u32 descriptors[2], avail[2], used[2];
};
#define SIZE 64
struct descriptor { u64 at; u32 len; u16 flags, next; };

/* Request n has descriptors 3n to 3n + 2. */
#define REQUESTS 16
#define BLOCKS 256
static struct disk {
        u64 buffers[REQUESTS][512] __attribute__((aligned(4096)));
        struct descriptor descriptors[SIZE];
        struct { u16 flags, index, heads[SIZE], event; } avail __attribute__((aligned(4096)));
        struct { u16 flags, index; struct { u32 head, len; } elements[SIZE]; u16 event; } used __attribute__((aligned(4096)));
        struct { u32 kind, zero; u64 sector; u8 status, busy; u32 block; u64 value; } requests[REQUESTS];
        volatile u16 *doorbell;
        u16 seen;
        u32 slot;
        /* Of its blocks: the last answered write, and whether a request is out. */
        u64 written[BLOCKS];
        u8 in_use[BLOCKS];
} disks[2], *disk = disks;

/* Makes what lies at a device's address reachable there: entry.S has done so for the first 4 GiB. */
extern u64 root[512];
static u64 *below(u64 *entry)
{
        static u64 tables[8][512] __attribute__((aligned(4096)));
        static int next;
        if (!*entry && next < 8) *entry = (u64)tables[next++] | 3;
        return (u64 *)(*entry & ~0xfffUL);
}
static void map(u64 at)
{
        u64 *entry = &below(&below(&root[at >> 39 & 511])[at >> 30 & 511])[at >> 21 & 511];
        if (!*entry) *entry = (at & ~0x1fffffUL) | 0x93;
        __asm__ volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" ::: "rax", "memory");
}

/* Gives addresses to a device that was plugged into a running QEMU: no firmware did. */
static void place(u32 slot)
{
        static u32 free = 0xe0000000;
        for (u32 bar = 0x10; bar < 0x28; bar += 4) {
                u32 is = pci(slot, bar), is_wide = (is & 6) == 4;
                if (is & 1) continue;
                if (!(is & ~15u) && !(is_wide && pci(slot, bar + 4))) {
                        pci_set(slot, bar, ~0u);
                        u32 size = ~(pci(slot, bar) & ~15u) + 1;
                        if (size) free = (free + size - 1) & -size;
                        pci_set(slot, bar, size ? free : 0);
                        free += size;
                }
                if (is_wide) bar += 4;
        }
}

static int start(u32 slot)
{
        volatile struct common *common = 0;
        u64 notify = 0;
        u32 multiplier = 0;
        place(slot);
        pci_set(slot, 4, (pci(slot, 4) & 0xffff) | 6);
        for (u32 at = pci8(slot, 0x34); at; at = pci8(slot, at + 1)) {
                if (pci8(slot, at) != 9) continue;
                u32 kind = pci8(slot, at + 3), bar = 0x10 + 4 * pci8(slot, at + 4);
                if (kind != 1 && kind != 2) continue;
                u64 base = pci(slot, bar);
                if ((base & 6) == 4) base |= (u64)pci(slot, bar + 4) << 32;
                base = (base & ~15UL) + pci(slot, at + 8);
                map(base);
                if (kind == 1) common = (void *)base;
                else notify = base, multiplier = pci(slot, at + 16);
        }
        if (!common || !notify) return 2;
        common->status = 0;
        while (common->status);
        common->status = 1;
        common->status = 3;
        common->accepted_half = 0, common->accepted = 0;
        common->accepted_half = 1, common->accepted = 1; /* VERSION_1 */
        common->status = 11;
        if (!(common->status & 8)) return 3;
        memset(&disk->avail, 0, sizeof disk->avail);
        memset(&disk->used, 0, sizeof disk->used);
        memset(&disk->requests, 0, sizeof disk->requests);
        memset(&disk->in_use, 0, sizeof disk->in_use);
        disk->seen = 0, disk->slot = slot;
        common->queue = 0;
        common->size = SIZE;
        common->vector = 0xffff;
        common->descriptors[0] = (u64)disk->descriptors, common->descriptors[1] = 0;
        common->avail[0] = (u64)&disk->avail, common->avail[1] = 0;
        common->used[0] = (u64)&disk->used, common->used[1] = 0;
        disk->avail.flags = 1;
        disk->doorbell = (void *)(notify + (u64)common->notify * multiplier);
        common->enabled = 1;
        common->status = 15;
        return 0;
}

static int init(u64 number)
{
        disk = &disks[number & 1];
        for (u32 slot = 0; slot < 32; slot++) {
                u32 id = pci(slot, 0);
                if ((id == 0x10421af4 || id == 0x10011af4) && !number--) return start(slot);
        }
        return 1;
}

/* Into the registers of the region that the VMM's ACPI tables call PCST. cloud-hypervisor's are in memory, where its table
 * (below 1 MiB) says; those of QEMU's machine "pc" are ports. */
static void eject(void)
{
        for (u8 *at = (u8 *)0x9f000; at < (u8 *)0x100000 - 32; at++) {
                if (at[0] != 0x5b || at[1] != 0x80 || at[2] != 'P' || at[3] != 'C' || at[4] != 'S' || at[5] != 'T') continue;
                if (at[7] != 0x0e && at[7] != 0x0c) continue;
                u64 base = at[7] == 0x0e ? *(u64 *)(at + 8) : *(u32 *)(at + 8);
                map(base);
                ((volatile u32 *)base)[3] = 0;
                ((volatile u32 *)base)[2] = 1u << disk->slot;
                return;
        }
        out32(0xae10, 0);
        out32(0xae08, 1u << disk->slot);
}

static void submit(int n, u32 kind, u64 sector)
{
        struct descriptor *at = &disk->descriptors[3 * n];
        disk->requests[n].kind = kind, disk->requests[n].zero = 0, disk->requests[n].sector = sector;
        disk->requests[n].status = 0xfe, disk->requests[n].busy = 1;
        at[0] = (struct descriptor){ (u64)&disk->requests[n], 16, 1, 3 * n + 1 };
        at[1] = (struct descriptor){ (u64)disk->buffers[n], 4096, kind ? 1 : 3, 3 * n + 2 };
        at[2] = (struct descriptor){ (u64)&disk->requests[n].status, 1, 2, 0 };
        disk->avail.heads[disk->avail.index % SIZE] = 3 * n;
        fence();
        *(volatile u16 *)&disk->avail.index = disk->avail.index + 1;
        fence();
        if (!(*(volatile u16 *)&disk->used.flags & 1)) *disk->doorbell = 0;
}

/* The request that was answered, or -1. */
static int answered(void)
{
        if (*(volatile u16 *)&disk->used.index == disk->seen) return -1;
        fence();
        u32 head = disk->used.elements[disk->seen++ % SIZE].head;
        if (head % 3 || head / 3 >= REQUESTS || !disk->requests[head / 3].busy) {
                tell("WRONG: nobody asked for head", head);
                return -1;
        }
        disk->requests[head / 3].busy = 0;
        return head / 3;
}

static void fill(int n, u64 value) { for (int i = 0; i < 512; i++) disk->buffers[n][i] = value; }
static u64 differ(int n, u64 value) { u64 count = 0; for (int i = 0; i < 512; i++) count += disk->buffers[n][i] != value; return count; }
static void wait_for(int n) { while (disk->requests[n].busy) { answered(); __asm__ volatile("pause"); } }

/* ---- load */

static u64 random_state = 88172645463325252UL;
static u64 random(void) { random_state ^= random_state << 13; random_state ^= random_state >> 7; random_state ^= random_state << 17; return random_state; }

static void load(u64 depth, int check)
{
        u64 count = check ? BLOCKS : ~0UL, issued = 0, done = 0, wrong = 0, errors = 0;
        if (depth > REQUESTS) depth = REQUESTS;
        while (done < count) {
                for (int n = 0; n < (int)depth && issued < count; n++) {
                        if (disk->requests[n].busy) continue;
                        u32 block = check ? issued : random() % BLOCKS;
                        if (disk->in_use[block]) continue;
                        int write = !check && random() % 4;
                        disk->requests[n].block = block;
                        disk->requests[n].value = write ? random() | 1 : disk->written[block];
                        fill(n, write ? disk->requests[n].value : 0xdead);
                        disk->in_use[block] = 1;
                        issued++;
                        submit(n, write, 8UL * block);
                }
                int n = answered();
                if (n < 0) continue;
                done++;
                if (!check && issued < count && is_told()) count = issued;
                disk->in_use[disk->requests[n].block] = 0;
                errors += disk->requests[n].status != 0;
                if (disk->requests[n].kind) {
                        disk->written[disk->requests[n].block] = disk->requests[n].value;
                        fill(n, 0xbad);
                } else wrong += differ(n, disk->requests[n].value) != 0;
        }
        if (!check) hear();
        tell("done", done);
        tell("wrong", wrong);
        tell("errors", errors);
}

static u64 sum(void) { u64 all = 0; for (int block = 0; block < BLOCKS; block++) all += disk->written[block]; return all; }

static void learn(void)
{
        u64 torn = 0, errors = 0;
        for (int block = 0; block < BLOCKS; block++) {
                fill(0, 0xdead);
                submit(0, 0, 8UL * block);
                wait_for(0);
                errors += disk->requests[0].status != 0;
                disk->written[block] = disk->buffers[0][0];
                torn += differ(0, disk->written[block]) != 0;
        }
        tell("torn", torn);
        tell("errors", errors);
        tell("sum", sum());
}

void guest(void)
{
        say("up\nok\n");
        for (;;) {
                hear();
                if (is("init")) tell("init", init(argument(1)));
                else if (is("disk")) disk = &disks[argument(1) & 1];
                else if (is("eject")) eject();
                else if (is("learn")) learn();
                else if (is("sum")) tell("sum", sum());
                else if (is("write")) {
                        fill(0, argument(2));
                        submit(0, 1, argument(1));
                        wait_for(0);
                        tell("status", disk->requests[0].status);
                } else if (is("read")) {
                        fill(0, 0xdead);
                        submit(0, 0, argument(1));
                        wait_for(0);
                        tell("status", disk->requests[0].status);
                        tell("differ", differ(0, argument(2)));
                } else if (is("hold")) {
                        fill(14, 0xaaaa);
                        fill(15, 0xcccc);
                        submit(14, 1, argument(1));
                        submit(15, 1, argument(2));
                        wait_for(15);
                        fill(15, 0xbad);
                        tell("held", disk->requests[14].busy);
                        tell("status", disk->requests[15].status);
                } else if (is("held")) {
                        wait_for(14);
                        tell("status", disk->requests[14].status);
                } else if (is("load")) load(argument(1), 0);
                else if (is("check")) load(1, 1);
                else say("WRONG: no such command\n");
                say("ok\n");
        }
}

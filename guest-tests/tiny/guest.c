/* A guest of a few kilobytes: no operating system, one virtio-blk disk, no interrupts. It does what it is told over the first
 * serial port, a line at a time, and ends each answer with a line "ok". Unlike any real guest it can be told to leave a
 * request unanswered and to use the buffer of another again, and it is in memory in no time.
 *
 *   init                       finds the disk and starts it
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
                if (c == '\n') { line[len] = 0; return; }
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
static struct descriptor descriptors[SIZE] __attribute__((aligned(4096)));
static struct { u16 flags, index, heads[SIZE], event; } avail __attribute__((aligned(4096)));
static struct { u16 flags, index; struct { u32 head, len; } elements[SIZE]; u16 event; } used __attribute__((aligned(4096)));
static volatile u16 *doorbell;
static u16 seen;

/* Request n has descriptors 3n to 3n + 2. */
#define REQUESTS 16
static struct { u32 kind, zero; u64 sector; u8 status, busy; u32 block; u64 value; } requests[REQUESTS];
static u64 buffers[REQUESTS][512] __attribute__((aligned(4096)));

extern u64 directory[512];
static u64 far_tables[4][512] __attribute__((aligned(4096)));
static void map(u64 at)
{
        static int next;
        u64 *entry = &directory[at >> 30 & 511];
        if (!*entry && next < 4) {
                u64 *table = far_tables[next++];
                for (u64 page = 0; page < 512; page++) table[page] = (at & ~0x3fffffffUL) | page << 21 | 0x93;
                *entry = (u64)table | 3;
                __asm__ volatile("mov %%cr3, %%rax; mov %%rax, %%cr3" ::: "rax", "memory");
        }
}

static int init(void)
{
        for (u32 slot = 0; slot < 32; slot++) {
                u32 id = pci(slot, 0);
                if (id != 0x10421af4 && id != 0x10011af4) continue;
                volatile struct common *common = 0;
                u64 notify = 0;
                u32 multiplier = 0;
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
                common->queue = 0;
                common->size = SIZE;
                common->vector = 0xffff;
                common->descriptors[0] = (u64)descriptors, common->descriptors[1] = 0;
                common->avail[0] = (u64)&avail, common->avail[1] = 0;
                common->used[0] = (u64)&used, common->used[1] = 0;
                avail.flags = 1;
                doorbell = (void *)(notify + (u64)common->notify * multiplier);
                common->enabled = 1;
                common->status = 15;
                return 0;
        }
        return 1;
}

static void submit(int n, u32 kind, u64 sector)
{
        struct descriptor *at = &descriptors[3 * n];
        requests[n].kind = kind, requests[n].zero = 0, requests[n].sector = sector;
        requests[n].status = 0xfe, requests[n].busy = 1;
        at[0] = (struct descriptor){ (u64)&requests[n], 16, 1, 3 * n + 1 };
        at[1] = (struct descriptor){ (u64)buffers[n], 4096, kind ? 1 : 3, 3 * n + 2 };
        at[2] = (struct descriptor){ (u64)&requests[n].status, 1, 2, 0 };
        avail.heads[avail.index % SIZE] = 3 * n;
        fence();
        *(volatile u16 *)&avail.index = avail.index + 1;
        fence();
        if (!(*(volatile u16 *)&used.flags & 1)) *doorbell = 0;
}

/* The request that was answered, or -1. */
static int answered(void)
{
        if (*(volatile u16 *)&used.index == seen) return -1;
        fence();
        u32 head = used.elements[seen++ % SIZE].head;
        if (head % 3 || head / 3 >= REQUESTS || !requests[head / 3].busy) {
                tell("WRONG: nobody asked for head", head);
                return -1;
        }
        requests[head / 3].busy = 0;
        return head / 3;
}

static void fill(int n, u64 value) { for (int i = 0; i < 512; i++) buffers[n][i] = value; }
static u64 differ(int n, u64 value) { u64 count = 0; for (int i = 0; i < 512; i++) count += buffers[n][i] != value; return count; }
static void wait_for(int n) { while (requests[n].busy) { answered(); __asm__ volatile("pause"); } }

/* ---- load */

#define BLOCKS 256
static u64 written[BLOCKS];
static u8 in_use[BLOCKS];
static u64 random_state = 88172645463325252UL;
static u64 random(void) { random_state ^= random_state << 13; random_state ^= random_state >> 7; random_state ^= random_state << 17; return random_state; }

static void load(u64 depth, int check)
{
        u64 count = check ? BLOCKS : ~0UL, issued = 0, done = 0, wrong = 0, errors = 0;
        if (depth > REQUESTS) depth = REQUESTS;
        while (done < count) {
                for (int n = 0; n < (int)depth && issued < count; n++) {
                        if (requests[n].busy) continue;
                        u32 block = check ? issued : random() % BLOCKS;
                        if (in_use[block]) continue;
                        int write = !check && random() % 4;
                        requests[n].block = block;
                        requests[n].value = write ? random() | 1 : written[block];
                        fill(n, write ? requests[n].value : 0xdead);
                        in_use[block] = 1;
                        issued++;
                        submit(n, write, 8UL * block);
                }
                int n = answered();
                if (n < 0) continue;
                done++;
                if (!check && issued < count && is_told()) count = issued;
                in_use[requests[n].block] = 0;
                errors += requests[n].status != 0;
                if (requests[n].kind) {
                        written[requests[n].block] = requests[n].value;
                        fill(n, 0xbad);
                } else wrong += differ(n, requests[n].value) != 0;
        }
        if (!check) hear();
        tell("done", done);
        tell("wrong", wrong);
        tell("errors", errors);
}

void guest(void)
{
        say("up\nok\n");
        for (;;) {
                hear();
                if (is("init")) tell("init", init());
                else if (is("write")) {
                        fill(0, argument(2));
                        submit(0, 1, argument(1));
                        wait_for(0);
                        tell("status", requests[0].status);
                } else if (is("read")) {
                        fill(0, 0xdead);
                        submit(0, 0, argument(1));
                        wait_for(0);
                        tell("status", requests[0].status);
                        tell("differ", differ(0, argument(2)));
                } else if (is("hold")) {
                        fill(14, 0xaaaa);
                        fill(15, 0xcccc);
                        submit(14, 1, argument(1));
                        submit(15, 1, argument(2));
                        wait_for(15);
                        fill(15, 0xbad);
                        tell("held", requests[14].busy);
                        tell("status", requests[15].status);
                } else if (is("held")) {
                        wait_for(14);
                        tell("status", requests[14].status);
                } else if (is("load")) load(argument(1), 0);
                else if (is("check")) load(1, 1);
                else say("WRONG: no such command\n");
                say("ok\n");
        }
}

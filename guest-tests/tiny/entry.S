/* Where the VMM starts us (the PVH note): 32-bit, flat, no paging. Maps the first 4 GiB onto themselves and goes to 64 bits. */
        .section .note.pvh, "a", @note
        .align 4
        .long 4, 4, 18                  /* "Xen\0", a 32-bit address, XEN_ELFNOTE_PHYS32_ENTRY */
        .asciz "Xen"
        .long entry

        .section .text.entry, "ax"
        .code32
        .globl entry
entry:
        cld
        movl $stack_end, %esp
        /* 4 tables of 512 pages of 2 MiB, present and writable */
        movl $tables, %edi
        movl $0x83, %eax
        movl $2048, %ecx
pages:  movl %eax, (%edi)
        addl $8, %edi
        addl $0x200000, %eax
        loop pages
        movl $tables + 3, %eax
        movl $directory, %edi
        movl $4, %ecx
third:  movl %eax, (%edi)
        addl $8, %edi
        addl $0x1000, %eax
        loop third
        movl $directory + 3, root
        movl $root, %eax
        movl %eax, %cr3
        movl %cr4, %eax
        orl $0x20, %eax                 /* PAE */
        movl %eax, %cr4
        movl $0xc0000080, %ecx          /* EFER: long mode */
        rdmsr
        orl $0x100, %eax
        wrmsr
        movl %cr0, %eax
        orl $0x80000001, %eax
        movl %eax, %cr0
        lgdt segments_at
        ljmp $8, $long_mode
        .code64
long_mode:
        movw $16, %ax
        movw %ax, %ds
        movw %ax, %es
        movw %ax, %ss
        movabs $stack_end, %rsp
        call guest
stop:   hlt
        jmp stop

        .section .data
        .align 16
segments:
        .quad 0
        .quad 0x00af9b000000ffff        /* code, 64 bits */
        .quad 0x00cf93000000ffff        /* data */
segments_at:
        .word 23
        .long segments

        .section .bss
        .align 4096
        .globl root
root:   .skip 4096
directory: .skip 4096
tables: .skip 16384
stack:  .skip 16384
stack_end:
